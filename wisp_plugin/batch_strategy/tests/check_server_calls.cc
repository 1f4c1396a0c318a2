// The order in which Triton calls (dynamic batch scheduler, 24.10), and the memory of when requests were first seen.
#include <chrono>
#include <memory>
#include <thread>

#include "batcher.h"
#include "check.h"
#include "first_seen.h"

namespace {

using wisp_test::ask;
using wisp_test::finish;
using wisp_test::Loaded;

// 1 ms a batch, 1 ms a token: `heavy` may not join `small` as long as the deadline of `small` can be met.
struct Case {
  Loaded loaded{{{"WISP_BASE_US", "1000"}, {"WISP_PER_TOKEN_US", "1000"}, {"WISP_TOKENS_INPUT", "TOKENS"}}};
  fakes::Request small, heavy;

  explicit Case(std::int64_t slo_ms) {
    small.with_input("TOKENS", {1, 1}).with_integer("wisp_slo_ms", slo_ms);
    heavy.with_input("TOKENS", {1, 1000});
  }
};

void sleep_ms(int duration_ms) { std::this_thread::sleep_for(std::chrono::milliseconds(duration_ms)); }

// A pending batch is formed anew: begun, asked and finished, then begun and asked about the same requests.
void check_formed_anew() {
  Case c(300);
  for (int round = 0; round < 2; ++round) {
    void* batch = c.loaded.begin();
    CHECK(ask(batch, c.small) && !ask(batch, c.heavy));
    finish(batch);
  }
  sleep_ms(310);
  void* batch = c.loaded.begin();
  CHECK(ask(batch, c.small) && ask(batch, c.heavy));  // too late: the deadline counts from the first look
  finish(batch);
}

// The batch has gone, which shows in a batch that is finished without a question. The same address is a new request.
void check_address_used_again() {
  Case c(300);
  void* batch = c.loaded.begin();
  CHECK(ask(batch, c.small));
  finish(batch);
  sleep_ms(310);
  finish(c.loaded.begin());
  batch = c.loaded.begin();
  CHECK(ask(batch, c.small) && !ask(batch, c.heavy));
  finish(batch);
}

// Urgent requests have come one in a millisecond: two long ones do not go together, with priorities. A request that is
// asked about again is not another one.
void check_urgent_to_come() {
  for (const int levels : {0, 1, 2}) {
    const Loaded loaded({{"WISP_BASE_US", "1000"}, {"WISP_PER_TOKEN_US", "1000"}, {"WISP_TOKENS_INPUT", "TOKENS"}}, ".",
                        levels);
    std::vector<fakes::Request> urgent(wisp::RecentRequests::kFewest);
    fakes::Request long_one, other;
    long_one.with_input("TOKENS", {1, 100});
    other.with_input("TOKENS", {1, 100});
    for (auto& request : urgent) {
      request.with_input("TOKENS", {1, 1}).with_integer("wisp_slo_ms", 110);
      sleep_ms(1);
      void* batch = loaded.begin();
      CHECK(ask(batch, request));
      finish(batch);
    }
    void* batch = loaded.begin();
    CHECK(ask(batch, long_one) && ask(batch, other) == (levels < 2));
    finish(batch);
    for (int i = 0; i < 200; ++i) {
      batch = loaded.begin();
      CHECK(ask(batch, long_one) && ask(batch, other) == (levels < 2));
      finish(batch);
    }
  }
}

// Everybody joins a batch in the end: urgent requests come with every look, and none of them can stand the long one.
void check_refused_enough() {
  const Loaded loaded({{"WISP_BASE_US", "1000"}, {"WISP_PER_TOKEN_US", "1000"}, {"WISP_TOKENS_INPUT", "TOKENS"}}, ".",
                      2);
  fakes::Request long_one;
  long_one.with_input("TOKENS", {1, 1000});
  for (unsigned refused = 0; refused <= wisp::kMostRefusals; ++refused) {
    for (int look = 0; look < 10; ++look) {
      fakes::Request urgent;
      urgent.with_input("TOKENS", {1, 1}).with_integer("wisp_slo_ms", 500);
      void* batch = loaded.begin();
      CHECK(ask(batch, urgent) && ask(batch, long_one) == (refused == wisp::kMostRefusals));
      finish(batch);
    }
    finish(loaded.begin());
  }
}

void check_lost_batches() {
  Case c(300);
  void* last = nullptr;
  for (std::size_t i = 0; i < 5 * wisp::Batcher::kNumBatches; ++i) {  // never finished, as Triton does at times
    last = c.loaded.begin();
    CHECK(last != nullptr && ask(last, c.small));
  }
  CHECK(!ask(last, c.heavy));
  finish(last);
  CHECK(c.loaded.begin() != nullptr);
}

void check_without_batch() {
  fakes::Request request;
  bool include = false;
  CHECK(TRITONBACKEND_ModelBatchIncludeRequest(request.handle(), nullptr, &include) == nullptr && include);
  CHECK(TRITONBACKEND_ModelBatchFinalize(nullptr) == nullptr);
  void* batch = &include;
  CHECK(TRITONBACKEND_ModelBatchInitialize(nullptr, &batch) == nullptr && batch == nullptr);
  Loaded loaded({{"WISP_BASE_US", "1"}});
  void* own = loaded.begin();
  CHECK(TRITONBACKEND_ModelBatchIncludeRequest(nullptr, own, &include) == nullptr && include);
  finish(own);
}

void check_malformed_is_said_once() {
  Loaded loaded({{"WISP_BASE_US", "1"}});
  fakes::Request request;
  request.with_text("wisp_slo_ms", "soon");
  fakes::taken_log();
  void* batch = loaded.begin();
  for (int i = 0; i < 3; ++i) CHECK(ask(batch, request));
  finish(batch);
  CHECK(fakes::taken_log().size() == 1);
}

}  // namespace

void check_first_seen() {
  auto table = std::make_unique<wisp::FirstSeen>();
  int requests[8 * wisp::FirstSeen::kNumBuckets];
  CHECK(table->recall(&requests[0], 10.0).first_us == 10.0);
  CHECK(table->recall(&requests[0], 20.0).first_us == 10.0);
  CHECK(table->recall(&requests[0], 5.0).first_us == 5.0);  // the clock was set back
  table->mark(&requests[0], true);
  CHECK(table->recall(&requests[0], 30.0).first_us == 5.0);  // formed anew, in the same batch
  table->batch_gone();
  CHECK(table->recall(&requests[0], 40.0).first_us == 5.0);  // asked again and refused since it was included
  table->mark(&requests[0], true);
  table->batch_gone();
  CHECK(table->recall(&requests[0], 50.0).first_us == 50.0);
  table->batch_gone();
  table->batch_gone();
  CHECK(table->recall(&requests[0], 60.0).first_us == 60.0);  // not asked for a whole batch: gone otherwise
  // Refused once for each batch that has gone, however often it was asked about.
  for (unsigned times = 0; times < 5; ++times) {
    for (int look = 0; look < 3; ++look) {
      CHECK(table->recall(&requests[1], 65.0).num_refused == times);
      table->mark(&requests[1], false);
    }
    table->batch_gone();
  }
  for (auto& request : requests) CHECK(table->recall(&request, 70.0).first_us <= 70.0);  // more than it holds
  table->mark(&table, true);
}

void check_server_calls() {
  check_formed_anew();
  check_address_used_again();
  check_urgent_to_come();
  check_refused_enough();
  check_lost_batches();
  check_without_batch();
  check_malformed_is_said_once();
}
