// When a batch is closed. Costs of these cases: 30 ms a batch and 1 ms a token, unless said otherwise.
#include <cmath>
#include <limits>

#include "check.h"
#include "pending_batch.h"

namespace {

constexpr double kNow_us = 1.7e15;
constexpr double kInfinite = std::numeric_limits<double>::infinity();
const wisp::CostModel kCosts{{0.030, 0, 0.001, 0, 0, 0}, {}, 1.0, 1.0};

wisp::Candidate of(double num_tokens, double deadline_ms = kInfinite) {
  wisp::Candidate candidate{wisp::item_features({0.0, num_tokens, 1.0}), std::nullopt};
  if (deadline_ms != kInfinite) candidate.deadline_us = kNow_us + deadline_ms * 1000.0;
  return candidate;
}

wisp::PendingBatch begun(const wisp::CostModel& costs = kCosts) {
  wisp::PendingBatch batch;
  batch.begin(costs);
  return batch;
}

void check_first_is_in() {
  for (const double deadline_ms : {-1e9, -1.0, 1.0, 1e9, kInfinite}) {
    auto batch = begun();
    CHECK(batch.offer(of(1e9, deadline_ms), kNow_us) && batch.num_members() == 1);
  }
}

void check_closing() {
  auto batch = begun();
  CHECK(batch.offer(of(10, 60), kNow_us) && std::abs(batch.predicted_s() - 0.040) < 1e-12);
  CHECK(batch.offer(of(10), kNow_us));     // 50 ms: still in time
  CHECK(!batch.offer(of(3000), kNow_us));  // 3050 ms instead of 50: saves one, displaces 3 * 30 / 3050
  CHECK(batch.num_members() == 2 && std::abs(batch.predicted_s() - 0.050) < 1e-12);
  CHECK(batch.offer(of(9.9), kNow_us));  // 59.9 ms: in time
  const wisp::Comparison small = batch.compare(of(1.1), kNow_us);
  CHECK(small.num_saved == 1.0 && small.num_lost == 0.0 && std::abs(small.num_displaced - 4.0 * 30 / 61) < 1e-9);
  CHECK(std::abs(small.apart_s - 0.091) < 1e-12 && !small.close());
}

void check_hopeless_do_not_count() {
  auto batch = begun();
  CHECK(batch.offer(of(10, 39), kNow_us));   // late even alone
  CHECK(batch.offer(of(500, 5), kNow_us));   // its own deadline is no reason
  CHECK(batch.offer(of(500), kNow_us + 1e9));
}

// One deadline saved against one lost: the candidate is in time now and would not be in a batch of its own.
void check_lost_counts() {
  auto batch = begun();
  batch.offer(of(10, 100), kNow_us);
  CHECK(batch.compare(of(3000, 3030), kNow_us).num_lost == 0.0);  // late either way
  CHECK(!batch.offer(of(3000, 3030), kNow_us));
  const wisp::Comparison loses = batch.compare(of(3000, 3050), kNow_us);
  CHECK(loses.num_saved == 1.0 && loses.num_lost == 1.0 && !loses.close());
  CHECK(batch.compare(of(3000, 3080), kNow_us).num_lost == 0.0);  // in time either way
  batch.offer(of(10, 100), kNow_us);
  CHECK(batch.compare(of(3000, 3055), kNow_us).close());  // two saved outweigh it
}

// Costs of these: 1 ms a batch and 1 ms a token. 64 urgent requests that could wait 60 ms have come, one in
// 10 ms, each with 5 ms of work.
const wisp::CostModel kSmallBase{{0.001, 0, 0.001, 0, 0, 0}, {}, 1.0, 1.0};

wisp::RecentRequests urgent_ones(double patience_s = 0.060) {
  wisp::RecentRequests recent;
  for (int i = 64; i > 0; --i) recent.note(patience_s, 0.005, kNow_us - i * 10'000.0);
  return recent;
}

// A second long request would make those late that come while the batch runs; nobody in the batch is in a hurry.
void check_spared() {
  const wisp::RecentRequests recent = urgent_ones();
  auto batch = begun(kSmallBase);
  CHECK(batch.offer(of(49, 5000), kNow_us, {&recent, true}));
  const wisp::Comparison two = batch.compare(of(49, 5000), kNow_us, {&recent, true});
  CHECK(std::abs(two.num_spared - 3.9) < 1e-9 && two.num_saved == 0.0);  // of 99 ms the first 39, at 100 a second
  CHECK(std::abs(two.apart_s - 0.105) < 1e-9 && std::abs(two.num_displaced - 2.0 * 6 / 99) < 1e-9 && two.close());
  CHECK(batch.compare(of(49), kNow_us, {&recent, true}).close());    // nor need anybody have a deadline
  CHECK(batch.offer(of(1, 50), kNow_us, {&recent, true}));           // 51 ms: as good for them as 50
  const wisp::Comparison loses = batch.compare(of(49, 105), kNow_us, {&recent, true});  // 100 ms; apart 106
  CHECK(loses.num_lost == 1.0 && loses.num_spared > 3.0 && loses.close());
}

void check_not_spared() {
  const wisp::RecentRequests recent = urgent_ones();
  const wisp::RecentRequests patient = urgent_ones(10.0);
  const wisp::RecentRequests hopeless = urgent_ones(-0.010);
  const wisp::RecentRequests endless = urgent_ones(kInfinite);
  const wisp::RecentRequests nobody;
  auto batch = begun(kSmallBase);
  batch.offer(of(49, 5000), kNow_us);
  CHECK(!batch.compare(of(49, 5000), kNow_us, {&recent, false}).close());  // they would not overtake
  for (const auto* others : {&patient, &hopeless, &endless, &nobody}) {
    const wisp::Comparison comparison = batch.compare(of(49, 5000), kNow_us, {others, true});
    CHECK(comparison.num_spared == 0.0 && !comparison.close());
  }
  CHECK(!batch.compare(of(49, 5000), kNow_us - 1e9, {&recent, true}).close());     // the clock was set back
  CHECK(!batch.compare(of(49, 5000), kNow_us + 3600e6, {&recent, true}).close());  // an hour ago they came
  wisp::RecentRequests few;
  for (std::size_t i = 1; i < wisp::RecentRequests::kFewest; ++i) few.note(0.060, 0.005, kNow_us - 10'000.0);
  CHECK(few.mean_gap_s(kNow_us) == 0.0 && few.num_saved(0.05, 0.05, 0.1, kNow_us) == 0.0);
}

// With priorities a delay counts less; an instance that starts with the next arrival makes every batch dearer.
void check_outlook_changes_delay() {
  const wisp::RecentRequests recent = urgent_ones(10.0);
  const wisp::RecentRequests nobody;
  auto batch = begun(kSmallBase);
  batch.offer(of(9, 20), kNow_us);
  const auto candidate = of(19);  // 29 ms; apart 30, or 35 with the wait for the next arrival
  CHECK(batch.compare(candidate, kNow_us).close());
  CHECK(!batch.compare(candidate, kNow_us, {&recent, false}).close());
  CHECK(batch.compare(candidate, kNow_us, {&recent, true}).close());
  CHECK(!batch.compare(candidate, kNow_us, {&nobody, false}).close());
  CHECK(batch.compare(of(1000), kNow_us, {&recent, false}).close());  // what is certain
  CHECK(std::abs(batch.compare(candidate, kNow_us, {&recent, true}).apart_s - 0.035) < 1e-9);
}

// Equal requests and a fixed cost: a deadline is not worth another batch.
void check_equal_requests() {
  for (const double deadline_ms : {35.0, 45.0, 200.0, kInfinite}) {
    auto batch = begun();
    for (int i = 0; i < 32; ++i) CHECK(batch.offer(of(1, i == 0 ? deadline_ms : kInfinite), kNow_us));
  }
}

void check_margin() {
  wisp::CostModel careful = kCosts;
  careful.margin = 2.0;
  auto batch = begun(careful);
  batch.offer(of(10, 12'000), kNow_us);
  CHECK(std::abs(batch.predicted_s() - 0.080) < 1e-12);
  CHECK(!batch.offer(of(6000), kNow_us));  // 12,080 ms with the margin
  auto plain = begun();
  plain.offer(of(10, 12'000), kNow_us);
  CHECK(plain.offer(of(6000), kNow_us));
}

void check_extremes() {
  auto batch = begun({{1e300, 0, 1e300, 0, 0, 0}, {}, 32.0, 1.0});
  for (int i = 0; i < 4; ++i) CHECK(batch.offer(of(1e9, 50), kNow_us));  // infinite costs: no reason to close
  auto many = begun({{1e-9, 0, 1e-9, 0, 0, 0}, {}, 1.0, 1.0});
  for (std::size_t i = 0; i < 3 * wisp::PendingBatch::kMaxDeadlines; ++i) CHECK(many.offer(of(1, 1e6), kNow_us));
  CHECK(many.num_members() == 3 * wisp::PendingBatch::kMaxDeadlines);
}

}  // namespace

void check_decisions() {
  check_first_is_in();
  check_closing();
  check_hopeless_do_not_count();
  check_lost_counts();
  check_spared();
  check_not_spared();
  check_outlook_changes_delay();
  check_equal_requests();
  check_margin();
  check_extremes();
}
