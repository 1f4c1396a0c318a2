#include "batcher.h"

#include <chrono>
#include <limits>

#include "request.h"

namespace wisp {
namespace {

constexpr double kForever_us = std::numeric_limits<double>::infinity();

double unix_time_us() noexcept {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

std::int64_t steady_time_ms() noexcept {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

// Holds a state for one call if nobody else does.
class Hold {
 public:
  explicit Hold(BatchState& state) noexcept
      : state_(state), held_(!state.busy.exchange(true, std::memory_order_acquire)) {}
  ~Hold() {
    if (held_) state_.busy.store(false, std::memory_order_release);
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  explicit operator bool() const noexcept { return held_; }

 private:
  BatchState& state_;
  bool held_;
};

}  // namespace

Batcher::Batcher(const Settings& settings)
    : settings_(settings),
      costs_(settings.profile_path.empty() ? CostSource(settings.inline_costs)
                                           : CostSource(settings.profile_path, settings.margin)) {
  for (BatchState& state : batches_) state.owner = this;
}

BatchState* Batcher::begin_batch() noexcept {
  costs_.refresh(steady_time_ms());
  for (std::size_t tries = 0; tries < kNumBatches; ++tries) {
    BatchState& state = batches_[next_batch_.fetch_add(1, std::memory_order_relaxed) % kNumBatches];
    const bool last = tries + 1 == kNumBatches;
    if (state.in_use.exchange(true, std::memory_order_acq_rel) && !last) continue;
    const Hold hold(state);
    if (!hold) continue;
    state.num_asked = 0;
    state.batch.begin(costs_.costs());
    return &state;
  }
  return nullptr;
}

bool Batcher::include(BatchState& state, TRITONBACKEND_Request* request) noexcept {
  const Hold hold(state);
  if (!hold || request == nullptr) return true;
  Batcher& self = *state.owner;
  const double now_us = unix_time_us();
  ++state.num_asked;
  const Seen seen = self.look(request, now_us);
  const Candidate candidate{item_features(read_size(request, self.settings_.inputs)), seen.deadline_us};
  const bool included = self.judge(state.batch, candidate, seen, now_us);
  if (seen.is_kept) self.first_seen_.mark(request, included);
  return included;
}

void Batcher::finish_batch(BatchState& state) noexcept {
  const Hold hold(state);
  if (hold && state.num_asked == 0) state.owner->first_seen_.batch_gone();
  state.in_use.store(false, std::memory_order_release);
}

Batcher::Seen Batcher::look(TRITONBACKEND_Request* request, double now_us) noexcept {
  const DeadlineTold told = read_deadline(request, settings_.default_slo_us);
  if (told.malformed) warn_malformed();
  Seen seen;
  const bool is_relative = told.kind == DeadlineTold::Kind::kRelative;
  seen.is_kept = is_relative || settings_.queue != Queue::kAhead;
  const FirstSeen::Memory memory = seen.is_kept ? first_seen_.recall(request, now_us) : FirstSeen::Memory{now_us, 0};
  seen.is_new = memory.first_us == now_us;
  seen.num_refused = memory.num_refused;
  if (told.kind != DeadlineTold::Kind::kNone) seen.deadline_us = is_relative ? memory.first_us + told.us : told.us;
  return seen;
}

bool Batcher::judge(PendingBatch& batch, const Candidate& candidate, const Seen& seen, double now_us) noexcept {
  if (seen.num_refused >= kMostRefusals) {
    batch.join(candidate);
    return true;
  }
  if (settings_.queue == Queue::kAhead) return batch.offer(candidate, now_us);
  const std::unique_lock<std::mutex> lock(recent_mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return batch.offer(candidate, now_us);
  if (seen.is_new) {
    const double left_us = candidate.deadline_us ? *candidate.deadline_us - now_us : kForever_us;
    const double alone_s = batch.alone_s(candidate);
    recent_.note(left_us * 1e-6 - alone_s, alone_s - batch.base_s(), now_us);
  }
  return batch.offer(candidate, now_us, {&recent_, settings_.queue == Queue::kPriority});
}

void Batcher::warn_malformed() noexcept {
  if (has_warned_.exchange(true, std::memory_order_relaxed)) return;
  log_line(TRITONSERVER_LOG_WARN,
           "a request parameter wisp_deadline_us or wisp_slo_ms is not a positive number and does not count; this is "
           "said once per model");
}

}  // namespace wisp
