#include "pending_batch.h"

namespace wisp {
namespace {

constexpr double kSecond_us = 1e6;

}  // namespace

void PendingBatch::begin(const CostModel& costs) noexcept {
  costs_ = costs;
  features_ = kEmptyPass;
  predicted_s_ = 0.0;
  num_members_ = 0;
  num_deadlines_ = 0;
}

bool PendingBatch::offer(const Candidate& candidate, double now_us) noexcept {
  if (num_members_ > 0 && num_deadlines_ > 0 && compare(candidate, now_us).close()) return false;
  take(candidate);
  return true;
}

Comparison PendingBatch::compare(const Candidate& candidate, double now_us) const noexcept {
  Comparison result;
  Features joined = features_;
  add(joined, candidate.features);
  result.closed_s = predicted_s_;
  result.joined_s = time_s(joined);
  const std::size_t saved = num_saved(now_us + result.closed_s * kSecond_us, now_us + result.joined_s * kSecond_us);
  if (saved == 0) return result;
  result.num_saved = static_cast<double>(saved);

  Features alone = kEmptyPass;
  add(alone, candidate.features);
  result.apart_s = result.closed_s + time_s(alone);
  if (candidate.deadline_us) {
    const double left_s = (*candidate.deadline_us - now_us) / kSecond_us;
    if (result.joined_s <= left_s && left_s < result.apart_s) result.num_lost = 1.0;
  }
  const double rate = static_cast<double>(num_members_ + 1) / result.joined_s;
  result.num_displaced = (result.apart_s - result.joined_s) * rate;
  return result;
}

std::size_t PendingBatch::num_saved(double closed_us, double joined_us) const noexcept {
  std::size_t count = 0;
  for (std::size_t i = 0; i < num_deadlines_; ++i) {
    // Without branches: the compiler makes vectors of it.
    count += static_cast<std::size_t>((closed_us <= deadlines_us_[i]) & (deadlines_us_[i] < joined_us));
  }
  return count;
}

void PendingBatch::take(const Candidate& candidate) noexcept {
  add(features_, candidate.features);
  predicted_s_ = time_s(features_);
  ++num_members_;
  if (candidate.deadline_us && num_deadlines_ < kMaxDeadlines) deadlines_us_[num_deadlines_++] = *candidate.deadline_us;
}

}  // namespace wisp
