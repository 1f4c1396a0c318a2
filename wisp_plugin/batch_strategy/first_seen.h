// When requests were first seen, for deadlines that count from there, and how often they were refused. Fixed size, no
// allocation.
//
// Triton tells no queueing time and asks about a request again: always after it was refused, and whenever it forms a
// pending batch anew. A request is known by its address, and addresses are used again by later requests, so an entry
// must not outlive its request. What the server does tell is when a batch has gone: it then begins a batch and
// finishes it without having asked (see batcher.h), which is `batch_gone` here.
//   - included in a batch that has gone: forgotten
//   - refused: known until the batch after that has gone too; it is the first to be asked for that one
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace wisp {

class FirstSeen {
 public:
  static constexpr std::size_t kNumBuckets = 512;
  static constexpr std::size_t kNumWays = 4;  // entries per bucket; the one that was asked longest ago makes room

  struct Memory {
    double first_us = 0.0;  // unix time
    unsigned num_refused = 0;  // batches that it was refused for and that have gone
  };

  // An unknown request is first seen now and known from now on.
  Memory recall(const void* request, double now_us) noexcept;

  // What was answered about a known request.
  void mark(const void* request, bool included) noexcept;

  void batch_gone() noexcept;

 private:
  struct Entry {
    const void* request = nullptr;
    double first_us = 0.0;
    std::uint64_t generation = 0;  // batches gone when it was last asked
    unsigned num_refused = 0;      // without the refusal that `generation` is of
    bool included = false;
    bool refused = false;          // when it was last asked
  };
  using Bucket = std::array<Entry, kNumWays>;

  bool is_known(const Entry& entry, const void* request) const noexcept;
  Bucket& bucket(const void* request) noexcept;

  std::mutex mutex_;  // only ever tried: Triton asks from one thread per model, any other is told the present
  std::array<Bucket, kNumBuckets> buckets_ = {};
  std::uint64_t generation_ = 1;
};

}  // namespace wisp
