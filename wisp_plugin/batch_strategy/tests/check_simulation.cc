// A server of one instance with a FIFO queue, with and without the strategy: late requests of random loads, and of
// loads in which it can help or must not hurt. Deterministic; times are simulated. The table in pending_batch.h is made
// of the random loads, with other values of kDelayWeight.
#include <algorithm>
#include <cmath>
#include <random>

#include "check.h"
#include "pending_batch.h"

namespace {

struct Job {
  double arrival_us;
  double num_tokens;
  double deadline_us;
};

struct Load {
  double base_s;       // fixed time of a batch
  double heavy_share;  // of requests with `heaviness` times the tokens
  double heaviness;
  double utilization;  // with full batches
  double slack;        // mean time to a deadline, in times of a full batch of light requests
  double heavy_slack;  // times that for heavy requests
  std::size_t max_batch;
};

struct Outcome {
  int num_late = 0;
  double busy_s = 0.0;
};

constexpr double kPerToken_s = 0.0005;
constexpr double kLight = 4.0;  // mean tokens of a light request
constexpr int kNumJobs = 3000;

std::vector<Job> make_jobs(const Load& load, unsigned seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const auto batch = static_cast<double>(load.max_batch);
  const double mean_tokens = kLight * (1.0 + (load.heaviness - 1.0) * load.heavy_share);
  const double light_s = load.base_s + batch * kLight * kPerToken_s;
  std::exponential_distribution<double> gap_s(load.utilization / (load.base_s / batch + mean_tokens * kPerToken_s));
  std::vector<Job> jobs;
  double now_us = 1e9;
  for (int i = 0; i < kNumJobs; ++i) {
    now_us += gap_s(random) * 1e6;
    const bool heavy = uniform(random) < load.heavy_share;
    const double num_tokens = kLight * (0.5 + uniform(random)) * (heavy ? load.heaviness : 1.0);
    const double slack_s = light_s * load.slack * (0.5 + uniform(random)) * (heavy ? load.heavy_slack : 1.0);
    jobs.push_back({now_us, num_tokens, now_us + slack_s * 1e6});
  }
  return jobs;
}

Outcome serve(const std::vector<Job>& jobs, const Load& load, bool with_strategy) {
  const wisp::CostModel costs{{load.base_s, 0, 0, 0, 0, 0}, {0, 0, kPerToken_s, 0, 0, 0}, 1.0, 1.0};
  Outcome outcome;
  double now_us = 0.0;
  wisp::PendingBatch batch;
  for (std::size_t next = 0; next < jobs.size();) {
    now_us = std::max(now_us, jobs[next].arrival_us);
    batch.begin(costs);
    std::size_t end = next;
    while (end < jobs.size() && end - next < load.max_batch && jobs[end].arrival_us <= now_us) {
      wisp::Candidate candidate{wisp::item_features({0.0, jobs[end].num_tokens, 1.0}), std::nullopt};
      if (with_strategy) candidate.deadline_us = jobs[end].deadline_us;  // without deadlines it never closes
      if (!batch.offer(candidate, now_us)) break;
      ++end;
    }
    now_us += batch.predicted_s() * 1e6;
    outcome.busy_s += batch.predicted_s();
    for (; next < end; ++next) outcome.num_late += jobs[next].deadline_us < now_us;
  }
  return outcome;
}

struct Pair {
  Outcome with, without;
};

Pair serve_both(const Load& load, unsigned num_seeds) {
  Pair result;
  for (unsigned seed = 0; seed < num_seeds; ++seed) {
    const std::vector<Job> jobs = make_jobs(load, seed);
    for (const bool with_strategy : {false, true}) {
      const Outcome outcome = serve(jobs, load, with_strategy);
      Outcome& sum = with_strategy ? result.with : result.without;
      sum.num_late += outcome.num_late;
      sum.busy_s += outcome.busy_s;
    }
  }
  return result;
}

void check_random_loads(int num_loads) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const auto u = [&] { return uniform(random); };
  int with = 0, without = 0, worst = 0, num_more = 0, num_fewer = 0;
  for (int i = 0; i < num_loads; ++i) {
    Load load{};
    load.base_s = 0.001 * std::pow(60.0, u());
    load.heavy_share = u() < 0.25 ? 0.0 : 0.2 * u() * u();
    load.heaviness = std::pow(10.0, 0.5 + 2.0 * u());
    load.utilization = 0.3 + u();
    load.slack = 1.0 + 4.0 * u();
    load.heavy_slack = 1.0 + 20.0 * u();
    load.max_batch = u() < 0.5 ? 8 : 32;
    const Pair pair = serve_both(load, 3);
    const int more = pair.with.num_late - pair.without.num_late;
    with += pair.with.num_late;
    without += pair.without.num_late;
    worst = std::max(worst, more);
    num_more += more > 9;
    num_fewer += more < -9;
  }
  std::printf("%d random loads: late %d without the strategy, %d with it; more in %d, fewer in %d, at most %d of %d "
              "more\n", num_loads, without, with, num_more, num_fewer, worst, 3 * kNumJobs);
  CHECK(with <= without && worst <= 3 * kNumJobs / 200);
}

// Late requests with the strategy are at most `most` times those without it.
void check_load(const char* name, const Load& load, double most, double most_busy) {
  const Pair pair = serve_both(load, 6);
  std::printf("%s: late %d without the strategy, %d with it; busy %+.2f %%\n", name, pair.without.num_late,
              pair.with.num_late, 100.0 * (pair.with.busy_s / pair.without.busy_s - 1.0));
  CHECK(pair.with.num_late <= pair.without.num_late * most && pair.with.busy_s <= pair.without.busy_s * most_busy);
}

}  // namespace

void check_simulation(int num_random_loads) {
  for (const double utilization : {0.5, 0.9, 1.3}) {
    check_load("equal, large base", {0.030, 0.0, 1.0, utilization, 2.0, 1.0, 8}, 1.0, 1.0);
    check_load("equal, small base", {0.002, 0.0, 1.0, utilization, 2.0, 1.0, 8}, 1.0, 1.0);
  }
  check_load("5 % heavy, small base", {0.002, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 0.90, 1.02);
  check_load("5 % heavy, middle base", {0.005, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 0.95, 1.02);
  check_load("5 % heavy, large base", {0.030, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 1.0, 1.02);
  check_random_loads(num_random_loads);
}
