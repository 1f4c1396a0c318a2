// When requests were first seen, for deadlines that count from there. Fixed size, no allocation.
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

  // Unix time in microseconds when `request` was first seen: `now_us` for an unknown one, which is known from now on.
  double time_us(const void* request, double now_us) noexcept;

  void mark_included(const void* request) noexcept;

  void batch_gone() noexcept;

 private:
  struct Entry {
    const void* request = nullptr;
    double first_us = 0.0;
    std::uint64_t generation = 0;  // batches gone when it was last asked
    bool included = false;
  };
  using Bucket = std::array<Entry, kNumWays>;

  bool is_known(const Entry& entry, const void* request) const noexcept;
  Bucket& bucket(const void* request) noexcept;

  std::mutex mutex_;  // only ever tried: Triton asks from one thread per model, any other is told the present
  std::array<Bucket, kNumBuckets> buckets_ = {};
  std::uint64_t generation_ = 1;
};

}  // namespace wisp
