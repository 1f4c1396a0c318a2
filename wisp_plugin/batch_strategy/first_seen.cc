#include "first_seen.h"

#include <algorithm>

namespace wisp {

FirstSeen::Memory FirstSeen::recall(const void* request, double now_us) noexcept {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return {now_us, 0};
  Bucket& entries = bucket(request);
  for (Entry& entry : entries) {
    if (!is_known(entry, request)) continue;
    if (entry.refused && entry.generation != generation_) ++entry.num_refused;
    entry.generation = generation_;
    entry.included = entry.refused = false;
    entry.first_us = std::min(entry.first_us, now_us);  // the clock may be set back
    return {entry.first_us, entry.num_refused};
  }
  // An expired entry of the same address must not be found later.
  for (Entry& entry : entries) {
    if (entry.request == request) entry = Entry{};
  }
  const auto oldest = std::min_element(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.generation < b.generation;
  });
  *oldest = Entry{request, now_us, generation_, 0, false, false};
  return {now_us, 0};
}

void FirstSeen::mark(const void* request, bool included) noexcept {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  for (Entry& entry : bucket(request)) {
    if (entry.request != request) continue;
    entry.included = included;
    entry.refused = !included;
  }
}

void FirstSeen::batch_gone() noexcept {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (lock.owns_lock()) ++generation_;
}

bool FirstSeen::is_known(const Entry& entry, const void* request) const noexcept {
  if (entry.request != request) return false;
  return generation_ - entry.generation <= (entry.included ? 0U : 1U);
}

FirstSeen::Bucket& FirstSeen::bucket(const void* request) noexcept {
  // Fibonacci hashing: addresses share their low bits.
  const std::uint64_t mixed = reinterpret_cast<std::uintptr_t>(request) * 0x9E3779B97F4A7C15ULL;
  return buckets_[static_cast<std::size_t>(mixed >> 55)];
}
static_assert(FirstSeen::kNumBuckets == std::size_t{1} << (64 - 55), "the hash has 9 bits");

}  // namespace wisp
