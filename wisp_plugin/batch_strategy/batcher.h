// Everything that belongs to one model: its settings, its costs and the batches that are being formed.
//
// How Triton calls (dynamic batch scheduler of 24.10, unchanged in 2026), all from one thread per model that holds the
// lock of the queue meanwhile:
//   - It begins a batch as soon as the one before runs or is full; nothing has been asked yet.
//   - Whenever it looks at the queue it finishes that batch and begins another, then asks from the front of the queue.
//     It goes on with the same batch only if a request in it has a timeout. So a pending batch that waits for its
//     queue delay is formed anew, with the same questions, at every look; and a batch that has gone is followed by
//     one that is begun and finished without a question (`FirstSeen::batch_gone`).
//   - With a queue policy it forms a batch only if an instance waits for one. But an instance that gets free does not
//     wake it: the next request does, or half a second, even if others are in the queue already.
//   - Without a queue policy it looks while all instances are busy, too, and adds what it finds to the batch that
//     waits for an instance. The strategy is given an empty batch then, and is not told what is in it already.
//   - To refuse the first request of a look would make it look again at once, in a loop, until the batch runs.
//   - Of a preferred batch size only the first of the accepted requests go; it asks about the others again.
//   - At times a batch is never finished. A failed initialization is followed by a finalization of null.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>

#include "config.h"
#include "first_seen.h"
#include "pending_batch.h"
#include "profile.h"
#include "recent.h"
#include "triton_api.h"

namespace wisp {

class Batcher;

// What Triton holds as `userp`.
struct BatchState {
  Batcher* owner = nullptr;
  std::atomic<bool> in_use{false};
  std::atomic<bool> busy{false};  // one thread at a time; a second one does without the strategy
  std::size_t num_asked = 0;
  PendingBatch batch;
};

class Batcher {
 public:
  // Triton forms one batch of a model at a time, but does not finish every one. So the batches are a ring, and when
  // all are taken one of them is taken again.
  static constexpr std::size_t kNumBatches = 16;

  // Raises ConfigError.
  explicit Batcher(const Settings& settings);

  BatchState* begin_batch() noexcept;
  static bool include(BatchState& state, TRITONBACKEND_Request* request) noexcept;
  static void finish_batch(BatchState& state) noexcept;

  const CostSource& costs() const noexcept { return costs_; }

 private:
  struct Seen {
    std::optional<double> deadline_us;
    unsigned num_refused = 0;
    bool is_new = false;   // never asked about before
    bool is_kept = false;  // `first_seen_` knows it
  };
  Seen look(TRITONBACKEND_Request* request, double now_us) noexcept;
  bool judge(PendingBatch& batch, const Candidate& candidate, const Seen& seen, double now_us) noexcept;
  void warn_malformed() noexcept;

  Settings settings_;
  CostSource costs_;
  FirstSeen first_seen_;
  std::mutex recent_mutex_;  // only ever tried, as that of `first_seen_`
  RecentRequests recent_;
  std::atomic<bool> has_warned_{false};
  std::atomic<std::size_t> next_batch_{0};
  std::array<BatchState, kNumBatches> batches_;
};

}  // namespace wisp
