// The batch that is being formed: its predicted time, its deadlines, and whether the next request may join.
//
// A strategy can only go on or close the batch: whoever is refused, and all behind it, run in a later batch. With
//     joined  = time of the batch with the candidate
//     closed  = time of the batch without it
//     apart   = closed + time of the candidate in a batch of its own, never less than `joined`
// the same requests are compared both ways, each deadline being worth 1:
//     saved     = members that are in time after `closed` and late after `joined`
//     lost      = 1 if the candidate is in time after `joined` and late after `apart`
//     displaced = (apart - joined) * (members + 1) / joined: requests that the server could have served in the time
//                 that a further batch costs, at the rate of the joined batch
// The batch is closed if saved > lost + kDelayWeight * displaced. That is goodput per second of both plans, with time
// valued at what the joined batch earns with it. The weight stands for those behind, whom a strategy cannot see: the
// time of a further batch delays all of them until the queue is empty. Two things follow. Without a deadline to save
// nothing is ever refused: the candidate has to run anyway and `apart` is never less than `joined`, so density alone
// is no reason to close. And equal requests with a fixed cost per batch stay together: `displaced` is then nearly the
// size of the batch.
//
// kDelayWeight is from the 400 random loads of tests/check_simulation.cc, 9,000 requests each, 45 % of them late
// without the strategy. By weight: loads with more late requests than without it (by more than 9), loads with fewer,
// the worst load's increase in percentage points, late requests saved in all loads together:
//     weight     1         2         3         4         6         8         12
//     more       60        27        13        11        6         3         2
//     fewer      174       171       152       139       115       105       86
//     worst      12.5      1.2       1.2       0.9       0.3       0.2       0.3
//     saved      15,054    18,727    17,024    15,693    13,459    11,894    9,369
// 8, because a strategy that is dropped into a server must not make it worse.
#pragma once

#include <array>
#include <cstddef>
#include <optional>

#include "cost_model.h"

namespace wisp {

inline constexpr double kDelayWeight = 8.0;

struct Candidate {
  Features features = {};              // `item_features`
  std::optional<double> deadline_us;   // unix time
};

// Seconds with the margin, and deadlines.
struct Comparison {
  double closed_s = 0.0;
  double joined_s = 0.0;
  double apart_s = 0.0;
  double num_saved = 0.0;
  double num_lost = 0.0;
  double num_displaced = 0.0;

  // False for NaN, when costs are out of range.
  bool close() const noexcept { return num_saved > num_lost + kDelayWeight * num_displaced; }
};

class PendingBatch {
 public:
  static constexpr std::size_t kMaxDeadlines = 512;  // further members count, but their deadlines do not

  void begin(const CostModel& costs) noexcept;

  // True: the candidate is in. False: the batch is to be closed. The first is always in.
  bool offer(const Candidate& candidate, double now_us) noexcept;

  // What `offer` would go by, for a batch with at least one member.
  Comparison compare(const Candidate& candidate, double now_us) const noexcept;

  // Predicted seconds with the margin.
  double predicted_s() const noexcept { return predicted_s_; }
  std::size_t num_members() const noexcept { return num_members_; }

 private:
  double time_s(const Features& features) const noexcept { return costs_.predict_s(features) * costs_.margin; }
  std::size_t num_saved(double closed_us, double joined_us) const noexcept;
  void take(const Candidate& candidate) noexcept;

  CostModel costs_;
  Features features_ = kEmptyPass;
  double predicted_s_ = 0.0;
  std::size_t num_members_ = 0;
  std::size_t num_deadlines_ = 0;
  std::array<double, kMaxDeadlines> deadlines_us_ = {};
};

}  // namespace wisp
