// A server of one instance, with and without the strategy: late requests of random loads, and of loads in which it can
// help or must not hurt. Deterministic; times are simulated. The tables in pending_batch.h are made of the random
// loads, with other values of its constants.
#include <algorithm>
#include <cmath>
#include <deque>
#include <random>

#include "check.h"
#include "pending_batch.h"

namespace {

struct Job {
  double arrival_us;
  double num_tokens;
  double deadline_us;
  bool relaxed;  // of the second level, where there are levels
  bool seen;
  unsigned num_refused;
};

struct Load {
  double base_s;       // fixed time of a batch
  double heavy_share;  // of requests with `heaviness` times the tokens
  double heaviness;
  double utilization;  // with full batches
  double slack;        // mean time to a deadline, in times of a full batch of light requests
  double heavy_slack;  // times that for heavy requests
  std::size_t max_batch;
  double any_level = 0.0;  // share of requests whose level is drawn; heavy ones are relaxed otherwise
};

struct Server {
  const char* name;
  bool has_priorities;
  // As Triton: the instance gets free and starts with the next arrival, or half a second later, even if others wait.
  bool starts_late;
};

struct Outcome {
  int num_late = 0;
  double busy_s = 0.0;
};

constexpr double kPerToken_s = 0.0005;
constexpr double kLight = 4.0;  // mean tokens of a light request
constexpr int kNumJobs = 3000;
constexpr int kNumSeeds = 3;
constexpr double kLatest_us = 500'000.0;

std::vector<Job> make_jobs(const Load& load, unsigned seed) {
  std::mt19937_64 random(seed);
  std::mt19937_64 random_level(seed + 1000);
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
    const bool is_drawn = uniform(random_level) < load.any_level;
    const bool relaxed = is_drawn ? uniform(random_level) < 0.5 : heavy;
    jobs.push_back({now_us, num_tokens, now_us + slack_s * 1e6, relaxed, false, 0});
  }
  return jobs;
}

// The queue of a server, and the batches that Triton makes of it.
class Simulation {
 public:
  Simulation(const Load& load, const Server& server, bool with_strategy)
      : load_(load), server_(server), with_strategy_(with_strategy),
        costs_{{load.base_s, 0, 0, 0, 0, 0}, {0, 0, kPerToken_s, 0, 0, 0}, 1.0, 1.0} {}

  Outcome serve(const std::vector<Job>& jobs) {
    for (;;) {
      arrive(jobs);
      const bool waiting = !queues_[0].empty() || !queues_[1].empty();
      if (!waiting && next_ == jobs.size()) return outcome_;
      if (next_ < jobs.size() && (!waiting || server_.starts_late)) {
        const double latest_us = waiting ? now_us_ + kLatest_us : jobs[next_].arrival_us;
        now_us_ = std::min(jobs[next_].arrival_us, latest_us);
        arrive(jobs);
      }
      run_batch();
    }
  }

 private:
  void arrive(const std::vector<Job>& jobs) {
    for (; next_ < jobs.size() && jobs[next_].arrival_us <= now_us_; ++next_) {
      queues_[server_.has_priorities && jobs[next_].relaxed].push_back(jobs[next_]);
    }
  }

  bool offer(Job& job) {
    wisp::Candidate candidate{wisp::item_features({0.0, job.num_tokens, 1.0}), std::nullopt};
    if (!with_strategy_) return batch_.offer(candidate, now_us_);  // without deadlines it never closes
    candidate.deadline_us = job.deadline_us;
    const double alone_s = batch_.alone_s(candidate);
    if (!job.seen) recent_.note((job.deadline_us - now_us_) * 1e-6 - alone_s, alone_s - batch_.base_s(), now_us_);
    job.seen = true;
    const bool has_outlook = server_.has_priorities || server_.starts_late;
    const wisp::Outlook outlook{has_outlook ? &recent_ : nullptr, server_.has_priorities};
    if (job.num_refused < wisp::kMostRefusals) {
      const bool included = batch_.offer(candidate, now_us_, outlook);
      job.num_refused += !included;
      return included;
    }
    batch_.join(candidate);
    return true;
  }

  void run_batch() {
    batch_.begin(costs_);
    deadlines_us_.clear();
    for (bool open = true; open && deadlines_us_.size() < load_.max_batch;) {
      auto& queue = queues_[queues_[0].empty()];
      open = !queue.empty() && offer(queue.front());
      if (!open) break;
      deadlines_us_.push_back(queue.front().deadline_us);
      queue.pop_front();
    }
    now_us_ += batch_.predicted_s() * 1e6;
    outcome_.busy_s += batch_.predicted_s();
    for (const double deadline_us : deadlines_us_) outcome_.num_late += deadline_us < now_us_;
  }

  const Load& load_;
  const Server& server_;
  bool with_strategy_;
  wisp::CostModel costs_;
  wisp::PendingBatch batch_;
  wisp::RecentRequests recent_;
  std::deque<Job> queues_[2];
  std::vector<double> deadlines_us_;
  std::size_t next_ = 0;
  double now_us_ = 0.0;
  Outcome outcome_;
};

struct Pair {
  Outcome with, without;
};

Pair serve_both(const Load& load, const Server& server, unsigned num_seeds) {
  Pair result;
  for (unsigned seed = 0; seed < num_seeds; ++seed) {
    const std::vector<Job> jobs = make_jobs(load, seed);
    for (const bool with_strategy : {false, true}) {
      const Outcome outcome = Simulation(load, server, with_strategy).serve(jobs);
      Outcome& sum = with_strategy ? result.with : result.without;
      sum.num_late += outcome.num_late;
      sum.busy_s += outcome.busy_s;
    }
  }
  return result;
}

Load any_load(std::mt19937_64& random, const Server& server) {
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const auto u = [&] { return uniform(random); };
  Load load{};
  load.base_s = 0.001 * std::pow(60.0, u());
  load.heavy_share = u() < 0.25 ? 0.0 : (server.has_priorities ? 0.5 : 0.2) * u() * u();
  load.heaviness = std::pow(10.0, 0.5 + 2.0 * u());
  load.utilization = 0.3 + u();
  load.slack = 1.0 + 4.0 * u();
  load.heavy_slack = 1.0 + 20.0 * u();
  load.max_batch = u() < 0.5 ? 8 : 32;
  if (server.has_priorities) load.any_level = u() < 0.5 ? 0.0 : u();
  return load;
}

// The strategy leaves at most `most` of the late requests, and adds at most `worst_share` of the requests of a load. A
// load counts for the latter if at most half of its requests are late without it: in the others nothing is in order.
void check_random_loads(const Server& server, int num_loads, double most, double worst_share) {
  constexpr int kJobsOfLoad = kNumSeeds * kNumJobs;
  std::mt19937_64 random(1);
  int with = 0, without = 0, worst = 0, worst_of_all = 0, num_more = 0, num_fewer = 0;
  double busy_s = 0.0, busy_without_s = 0.0;
  for (int i = 0; i < num_loads; ++i) {
    const Pair pair = serve_both(any_load(random, server), server, kNumSeeds);
    const int more = pair.with.num_late - pair.without.num_late;
    with += pair.with.num_late;
    without += pair.without.num_late;
    busy_s += pair.with.busy_s;
    busy_without_s += pair.without.busy_s;
    worst_of_all = std::max(worst_of_all, more);
    if (2 * pair.without.num_late <= kJobsOfLoad) worst = std::max(worst, more);
    num_more += more > 9;
    num_fewer += more < -9;
  }
  std::printf("%s, %d random loads: late %d without the strategy, %d with it; more in %d, fewer in %d, at most %d of "
              "%d more (%d where half are late); busy %+.2f %%\n", server.name, num_loads, without, with, num_more,
              num_fewer, worst, kJobsOfLoad, worst_of_all, 100.0 * (busy_s / busy_without_s - 1.0));
  CHECK(with <= without * most && worst <= worst_share * kJobsOfLoad);
}

// Late requests with the strategy are at most `most` times those without it.
void check_load(const char* name, const Server& server, const Load& load, double most, double most_busy) {
  const Pair pair = serve_both(load, server, 6);
  std::printf("%s, %s: late %d without the strategy, %d with it; busy %+.2f %%\n", server.name, name,
              pair.without.num_late, pair.with.num_late, 100.0 * (pair.with.busy_s / pair.without.busy_s - 1.0));
  CHECK(pair.with.num_late <= pair.without.num_late * most && pair.with.busy_s <= pair.without.busy_s * most_busy);
}

constexpr Server kOneQueue{"one queue", false, false};
constexpr Server kOneQueueLate{"one queue, starts late", false, true};
constexpr Server kPriorities{"priorities", true, false};
constexpr Server kPrioritiesLate{"priorities, starts late", true, true};

}  // namespace

void check_simulation(int num_random_loads) {
  for (const Server& server : {kOneQueue, kOneQueueLate, kPriorities, kPrioritiesLate}) {
    for (const double utilization : {0.5, 0.9, 1.3}) {
      check_load("equal, large base", server, {0.030, 0.0, 1.0, utilization, 2.0, 1.0, 8}, 1.0, 1.0);
      check_load("equal, small base", server, {0.002, 0.0, 1.0, utilization, 2.0, 1.0, 8}, 1.01, 1.005);
    }
  }
  check_load("5 % heavy, small base", kOneQueue, {0.002, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 0.90, 1.02);
  check_load("5 % heavy, middle base", kOneQueue, {0.005, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 0.95, 1.02);
  check_load("5 % heavy, large base", kOneQueue, {0.030, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 1.0, 1.02);
  check_load("5 % heavy, small base", kOneQueueLate, {0.002, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 1.0, 1.02);
  for (const Server& server : {kPriorities, kPrioritiesLate}) {
    check_load("5 % heavy, small base", server, {0.002, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 0.7, 1.05);
    check_load("5 % heavy, middle base", server, {0.005, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 0.7, 1.05);
    check_load("5 % heavy, large base", server, {0.030, 0.05, 30.0, 0.4, 4.0, 20.0, 8}, 1.0, 1.05);
  }
  check_random_loads(kOneQueue, num_random_loads, 1.0, 0.005);
  check_random_loads(kOneQueueLate, num_random_loads, 1.0, 0.005);
  check_random_loads(kPriorities, num_random_loads, 0.88, 0.01);
  check_random_loads(kPrioritiesLate, num_random_loads, 0.9, 0.03);
}
