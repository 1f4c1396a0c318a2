#include "pending_batch.h"

namespace wisp {
namespace {

constexpr double kSecond_us = 1e6;

double delay_weight(const Outlook& outlook) noexcept {
  if (outlook.urgent_overtake) return kUrgentDelayWeight;
  return outlook.recent != nullptr ? kIdleDelayWeight : kDelayWeight;
}

}  // namespace

void PendingBatch::begin(const CostModel& costs) noexcept {
  costs_ = costs;
  features_ = kEmptyPass;
  predicted_s_ = 0.0;
  num_members_ = 0;
  num_deadlines_ = 0;
}

bool PendingBatch::offer(const Candidate& candidate, double now_us, const Outlook& outlook) noexcept {
  if (num_members_ > 0 && compare(candidate, now_us, outlook).close()) return false;
  join(candidate);
  return true;
}

Comparison PendingBatch::compare(const Candidate& candidate, double now_us, const Outlook& outlook) const noexcept {
  Comparison result;
  result.delay_weight = delay_weight(outlook);
  Features joined = features_;
  add(joined, candidate.features);
  result.closed_s = predicted_s_;
  result.joined_s = time_s(joined);
  const std::size_t saved = num_saved(now_us + result.closed_s * kSecond_us, now_us + result.joined_s * kSecond_us);
  result.num_saved = static_cast<double>(saved);
  const bool has_outlook = outlook.recent != nullptr;
  if (saved == 0 && !(has_outlook && outlook.urgent_overtake)) return result;

  const double alone = alone_s(candidate);
  if (has_outlook && outlook.urgent_overtake) {
    result.num_spared = outlook.recent->num_saved(result.closed_s, alone, result.joined_s, now_us);
  }
  result.apart_s = result.closed_s + alone + (has_outlook ? outlook.recent->idle_s(now_us) : 0.0);
  if (candidate.deadline_us) {
    const double left_s = (*candidate.deadline_us - now_us) / kSecond_us;
    if (result.joined_s <= left_s && left_s < result.apart_s) result.num_lost = 1.0;
  }
  const double rate = static_cast<double>(num_members_ + 1) / result.joined_s;
  result.num_displaced = (result.apart_s - result.joined_s) * rate;
  return result;
}

double PendingBatch::alone_s(const Candidate& candidate) const noexcept {
  Features alone = kEmptyPass;
  add(alone, candidate.features);
  return time_s(alone);
}

std::size_t PendingBatch::num_saved(double closed_us, double joined_us) const noexcept {
  std::size_t count = 0;
  for (std::size_t i = 0; i < num_deadlines_; ++i) {
    // Without branches: the compiler makes vectors of it.
    count += static_cast<std::size_t>((closed_us <= deadlines_us_[i]) & (deadlines_us_[i] < joined_us));
  }
  return count;
}

void PendingBatch::join(const Candidate& candidate) noexcept {
  add(features_, candidate.features);
  predicted_s_ = time_s(features_);
  ++num_members_;
  if (candidate.deadline_us && num_deadlines_ < kMaxDeadlines) deadlines_us_[num_deadlines_++] = *candidate.deadline_us;
}

}  // namespace wisp
