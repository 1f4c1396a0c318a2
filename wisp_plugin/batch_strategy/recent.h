// The requests that came last, taken for those that will come next: what does a batch do to them?
//
// Not thread-safe: the batcher has a lock around it.
#pragma once

#include <array>
#include <cstddef>

namespace wisp {

class RecentRequests {
 public:
  static constexpr std::size_t kNumRequests = 64;
  static constexpr std::size_t kFewest = 16;  // fewer say nothing about those to come

  // A request that was seen for the first time. It could wait `patience_s` and be in time in a batch of its own;
  // infinite without a deadline. What it had waited before it was seen is not in there, so this is rather too little.
  // `work_s`: the time that it adds to a batch.
  void note(double patience_s, double work_s, double now_us) noexcept;

  // Seconds from one request to the next, on average; 0 if unknown.
  double mean_gap_s(double now_us) const noexcept;

  // What it costs, in seconds of work, that an instance waits for the next arrival before it starts: the mean gap,
  // times 2 load^2. The load is the share of the time that the work takes at the least, in endless batches: an instance
  // that is idle anyway loses little. The factor is from simulations (pending_batch.h). 0 if unknown.
  double idle_s(double now_us) const noexcept;

  // A request that comes while a batch runs, and is in the next one, is late if more of the batch is left than its
  // patience. Expected number of requests that are late because of a batch of `joined_s`, less those because of one of
  // `closed_s` or one of `alone_s`. Requests without any patience are late anyway and do not count.
  double num_saved(double closed_s, double alone_s, double joined_s, double now_us) const noexcept;

 private:
  std::size_t count() const noexcept { return num_noted_ < kNumRequests ? num_noted_ : kNumRequests; }

  std::array<double, kNumRequests> patience_s_ = {};  // a ring, and so are the others
  std::array<double, kNumRequests> work_s_ = {};
  std::array<double, kNumRequests> times_us_ = {};
  std::size_t num_noted_ = 0;
};

}  // namespace wisp
