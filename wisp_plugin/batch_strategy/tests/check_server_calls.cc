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
  CHECK(table->time_us(&requests[0], 10.0) == 10.0);
  CHECK(table->time_us(&requests[0], 20.0) == 10.0);
  CHECK(table->time_us(&requests[0], 5.0) == 5.0);  // the clock was set back
  table->mark_included(&requests[0]);
  CHECK(table->time_us(&requests[0], 30.0) == 5.0);  // formed anew, in the same batch
  table->batch_gone();
  CHECK(table->time_us(&requests[0], 40.0) == 5.0);  // asked again and refused since it was included
  table->mark_included(&requests[0]);
  table->batch_gone();
  CHECK(table->time_us(&requests[0], 50.0) == 50.0);
  table->batch_gone();
  table->batch_gone();
  CHECK(table->time_us(&requests[0], 60.0) == 60.0);  // not asked for a whole batch: gone otherwise
  for (auto& request : requests) CHECK(table->time_us(&request, 70.0) <= 70.0);  // more than it holds
  table->mark_included(&table);
}

void check_server_calls() {
  check_formed_anew();
  check_address_used_again();
  check_lost_batches();
  check_without_batch();
  check_malformed_is_said_once();
}
