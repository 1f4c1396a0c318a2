// The batch that is being formed: its predicted time, its deadlines, and whether the next request may join.
//
// A strategy can only go on or close the batch: whoever is refused, and all behind it, run in a later batch. With
//     joined  = time of the batch with the candidate
//     closed  = time of the batch without it
//     apart   = closed + idle + time of the candidate in a batch of its own, never less than `joined`
// the same requests are compared both ways, each deadline being worth 1:
//     saved     = members that are in time after `closed` and late after `joined`
//     spared    = expected number of requests still to come that will be late because they find the joined batch
//                 running, and would not be if they found either of the two (recent.h); only with priorities
//     lost      = 1 if the candidate is in time after `joined` and late after `apart`
//     displaced = (apart - joined) * (members + 1) / joined: requests that the server could have served in the time
//                 that a further batch costs, at the rate of the joined batch
// The batch is closed if saved + spared > lost + weight * displaced. That is goodput per second of both plans, with
// time valued at what the joined batch earns with it. Two things follow. Without a deadline to save nothing is ever
// refused: the candidate has to run anyway and `apart` is never less than `joined`, so density alone is no reason to
// close. And equal requests with a fixed cost per batch stay together: `displaced` is then nearly the batch's size.
//
// `idle` is Triton's: where it does not fill batches ahead of time, an instance that gets free starts with the next
// request that arrives, even if others wait (batcher.h). So every further batch costs part of the mean time between two
// requests, too (`RecentRequests::idle_s`); 0 where batches are filled ahead.
//
// The weights are from the 400 random loads each of tests/check_simulation.cc, 9,000 requests a load, 40 to 53 % of
// them late without the strategy. The tables show: loads with more late requests than without it (by more than 9),
// loads with fewer, the worst load's increase in percentage points, late requests saved in all loads together.
//
// One queue, an instance that starts at once. The weight stands for those behind, whom a strategy cannot see: the time
// of a further batch delays all of them until the queue is empty.
//     weight     1         2         3         4         6         8         12
//     more       60        27        13        11        6         3         2
//     fewer      174       171       152       139       115       105       86
//     worst      12.5      1.2       1.2       0.9       0.3       0.2       0.3
//     saved      15,054    18,727    17,024    15,693    13,459    11,894    9,369
// 8, because a strategy that is dropped into a server must not make it worse.
//
// One queue, an instance that starts with the next arrival. Hardly anything is won, and delays add up. 32: only what is
// certain, a request that dwarfs the batch.
//     weight     4         8         16        32
//     more       27        8         2         0
//     fewer      64        24        6         0
//     worst      1.3       0.4       0.2       0.0
//     saved      2,156     540       140       44
//
// Priorities, an instance that starts with the next arrival. Those behind can wait and the urgent overtake, so time is
// worth what it earns. What counts most is those who come next: nobody overtakes a batch that runs, so a batch of
// several long requests makes urgent ones late that had not arrived when it was closed. Without `spared` most of the
// gain is gone; without `idle`, or with the whole gap whatever the load, the worst loads are worse.
//     weight     0.5       1         2         4         1, no spared   1, no idle   1, idle a whole gap
//     more       68        25        18        24        23             48           18
//     fewer      233       236       192       126       226            227          243
//     worst      13.5      2.5       2.0       1.4       1.6            34.7         5.6
//     saved      289,289   228,023   123,732   52,012    93,128         303,845      247,822
// 1: what is saved outweighs the few loads that get worse. The same with an instance that starts at once: 228,439
// saved, 5 loads worse, by 0.6 points at most.
//
// A request is refused for kMostRefusals batches at most, or long ones would wait for as long as there are urgent ones
// that cannot stand them. With priorities, an instance that starts with the next arrival:
//     refusals   2         3         4         5         any number
//     more       21        25        30        30        36
//     fewer      239       236       233       229       232
//     worst      2.5       2.5       2.5       3.1       5.1
//     saved      200,457   228,023   243,390   255,891   366,528
#pragma once

#include <array>
#include <cstddef>
#include <optional>

#include "cost_model.h"
#include "recent.h"

namespace wisp {

inline constexpr double kDelayWeight = 8.0;
inline constexpr double kIdleDelayWeight = 32.0;
inline constexpr double kUrgentDelayWeight = 1.0;
inline constexpr unsigned kMostRefusals = 3;  // of a request; then it joins whatever there is

// What is known of the requests that are not in the queue yet.
struct Outlook {
  const RecentRequests* recent = nullptr;  // null: nothing, and an instance starts at once
  bool urgent_overtake = false;            // the queue has priorities
};

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
  double num_spared = 0.0;
  double num_lost = 0.0;
  double num_displaced = 0.0;
  double delay_weight = kDelayWeight;

  // False for NaN, when costs are out of range.
  bool close() const noexcept { return num_saved + num_spared > num_lost + delay_weight * num_displaced; }
};

class PendingBatch {
 public:
  static constexpr std::size_t kMaxDeadlines = 512;  // further members count, but their deadlines do not

  void begin(const CostModel& costs) noexcept;

  // True: the candidate is in. False: the batch is to be closed. The first is always in.
  bool offer(const Candidate& candidate, double now_us, const Outlook& outlook = {}) noexcept;

  // In without a question.
  void join(const Candidate& candidate) noexcept;

  // What `offer` would go by, for a batch with at least one member.
  Comparison compare(const Candidate& candidate, double now_us, const Outlook& outlook = {}) const noexcept;

  // Predicted seconds, with the margin, of a batch of this candidate and no other.
  double alone_s(const Candidate& candidate) const noexcept;
  double base_s() const noexcept { return time_s(kEmptyPass); }

  // Predicted seconds with the margin.
  double predicted_s() const noexcept { return predicted_s_; }
  std::size_t num_members() const noexcept { return num_members_; }

 private:
  double time_s(const Features& features) const noexcept { return costs_.predict_s(features) * costs_.margin; }
  std::size_t num_saved(double closed_us, double joined_us) const noexcept;
  CostModel costs_;
  Features features_ = kEmptyPass;
  double predicted_s_ = 0.0;
  std::size_t num_members_ = 0;
  std::size_t num_deadlines_ = 0;
  std::array<double, kMaxDeadlines> deadlines_us_ = {};
};

}  // namespace wisp
