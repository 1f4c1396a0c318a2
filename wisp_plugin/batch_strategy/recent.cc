#include "recent.h"

#include <algorithm>
#include <numeric>

namespace wisp {

void RecentRequests::note(double patience_s, double work_s, double now_us) noexcept {
  const std::size_t at = num_noted_++ % kNumRequests;
  patience_s_[at] = patience_s;
  work_s_[at] = work_s;
  times_us_[at] = now_us;
}

double RecentRequests::mean_gap_s(double now_us) const noexcept {
  if (num_noted_ < kFewest) return 0.0;
  const double oldest_us = times_us_[num_noted_ <= kNumRequests ? 0 : num_noted_ % kNumRequests];
  return std::max(now_us - oldest_us, 0.0) * 1e-6 / static_cast<double>(count());  // the clock may be set back
}

double RecentRequests::idle_s(double now_us) const noexcept {
  const double gap_s = mean_gap_s(now_us);
  if (!(gap_s > 0.0)) return 0.0;
  const double work_s = std::accumulate(work_s_.begin(), work_s_.end(), 0.0);  // of unused ones: 0
  const double load = work_s / (static_cast<double>(count()) * gap_s);
  return gap_s * 2.0 * load * load;
}

double RecentRequests::num_saved(double closed_s, double alone_s, double joined_s, double now_us) const noexcept {
  const double gap_s = mean_gap_s(now_us);
  if (!(gap_s > 0.0)) return 0.0;
  double too_early_s = 0.0;  // the part of the batch in which a request must not come, summed over the requests
  for (std::size_t i = 0; i < count(); ++i) {
    const double patience_s = patience_s_[i];
    const double joined = joined_s - patience_s;
    const double apart = std::max(closed_s - patience_s, 0.0) + std::max(alone_s - patience_s, 0.0);
    too_early_s += patience_s > 0.0 ? std::max(joined - apart, 0.0) : 0.0;
  }
  return too_early_s / (static_cast<double>(count()) * gap_s);
}

}  // namespace wisp
