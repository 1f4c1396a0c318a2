// Sizes and deadlines that requests tell.
#include <limits>

#include "check.h"
#include "request.h"

namespace {

using Kind = wisp::DeadlineTold::Kind;
using wisp::read_deadline;
using wisp::read_size;
constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

bool is(const wisp::RequestSize& size, double num_cached, double num_new, double num_choices) {
  return size.num_cached == num_cached && size.num_new == num_new && size.num_choices == num_choices;
}

void check_sizes() {
  fakes::Request request;
  request.with_input("TOKENS", {1, 3}).with_input("DRAFT", {1, 4}).with_input("PREFIX", {1, 100});
  CHECK(is(read_size(request.handle(), {"TOKENS", "DRAFT", "PREFIX", false}), 100, 7, 5));
  CHECK(is(read_size(request.handle(), {"TOKENS", "", "", false}), 0, 3, 1));
  CHECK(is(read_size(request.handle(), {"TOKENS", "NOT_SENT", "NOT_SENT", true}), 0, 3, 1));
  CHECK(is(read_size(request.handle(), {}), 0, 1, 1));
  fakes::Request rows;
  rows.with_input("TOKENS", {5, 3});
  CHECK(is(read_size(rows.handle(), {}), 0, 5, 1));
  CHECK(is(read_size(rows.handle(), {"", "", "TOKENS", false}), 15, 5, 1));
  fakes::Request nothing;
  CHECK(is(read_size(nothing.handle(), {}), 0, 1, 1));
  CHECK(is(read_size(nothing.handle(), {"TOKENS", "DRAFT", "PREFIX", true}), 0, 0, 1));
}

void check_absurd_sizes() {
  fakes::Request request;
  request.with_input("TOKENS", {kMost, kMost, kMost}).with_input("DRAFT", {-1, -7}).with_input("PREFIX", {});
  CHECK(is(read_size(request.handle(), {"TOKENS", "DRAFT", "PREFIX", false}), 1, wisp::kMaxCount, 1));
  request.inputs[0].broken = true;
  CHECK(is(read_size(request.handle(), {"TOKENS", "DRAFT", "", false}), 0, 0, 1));
}

void check_context_values() {
  const wisp::SizeInputs inputs{"TOKENS", "", "PREFIX", true};
  for (const auto type : {TRITONSERVER_TYPE_INT32, TRITONSERVER_TYPE_INT64}) {
    fakes::Request request;
    CHECK(is(read_size(request.with_value("PREFIX", 1234, type).handle(), inputs), 1234, 0, 1));
    fakes::Request negative;
    CHECK(is(read_size(negative.with_value("PREFIX", -5, type).handle(), inputs), 0, 0, 1));
  }
  fakes::Request request;
  request.with_value("PREFIX", kMost);
  CHECK(is(read_size(request.handle(), inputs), wisp::kMaxCount, 0, 1));
  request.inputs[0].data.resize(7);  // shorter than an INT64
  CHECK(is(read_size(request.handle(), inputs), 0, 0, 1));
  request.inputs[0].data.clear();
  CHECK(is(read_size(request.handle(), inputs), 0, 0, 1));
  fakes::Request on_gpu;
  on_gpu.with_value("PREFIX", 9).inputs[0].memory = TRITONSERVER_MEMORY_GPU;
  CHECK(is(read_size(on_gpu.handle(), inputs), 0, 0, 1));
  fakes::Request other_type;
  other_type.with_value("PREFIX", 9).inputs[0].type = TRITONSERVER_TYPE_BF16;
  CHECK(is(read_size(other_type.handle(), inputs), 0, 0, 1));
}

bool is(const wisp::DeadlineTold& told, Kind kind, double us, bool malformed = false) {
  return told.kind == kind && told.us == us && told.malformed == malformed;
}

void check_deadlines() {
  fakes::Request integer, number, text, slo, timeout, nothing;
  CHECK(is(read_deadline(integer.with_integer("wisp_deadline_us", 1'700'000'000'000'001).handle(), 5.0),
           Kind::kAbsolute, 1.700000000000001e15));
  CHECK(is(read_deadline(number.with_number("wisp_deadline_us", 1.5e15).handle(), {}), Kind::kAbsolute, 1.5e15));
  CHECK(is(read_deadline(text.with_text("wisp_deadline_us", "1700000000000001").handle(), {}), Kind::kAbsolute,
           1.700000000000001e15));
  CHECK(is(read_deadline(slo.with_text("x", "y").with_number("wisp_slo_ms", 2.5).handle(), 5.0), Kind::kRelative,
           2500.0));
  slo.with_integer("wisp_deadline_us", 77);
  CHECK(is(read_deadline(slo.handle(), {}), Kind::kAbsolute, 77.0));
  timeout.timeout_us = 4000;
  CHECK(is(read_deadline(timeout.handle(), {}), Kind::kRelative, 4000.0));
  CHECK(is(read_deadline(timeout.handle(), 5.0), Kind::kRelative, 5.0));
  CHECK(is(read_deadline(nothing.handle(), {}), Kind::kNone, 0.0));
}

void check_malformed_deadlines() {
  for (const char* wrong : {"", "soon", "-1", "0", "nan", "1e999", "12 "}) {
    fakes::Request request;
    CHECK(is(read_deadline(request.with_text("wisp_deadline_us", wrong).handle(), 5.0), Kind::kRelative, 5.0, true));
  }
  fakes::Request negative, infinite, boolean;
  CHECK(is(read_deadline(negative.with_integer("wisp_slo_ms", -kMost).handle(), {}), Kind::kNone, 0.0, true));
  infinite.with_number("wisp_slo_ms", std::numeric_limits<double>::infinity());
  CHECK(is(read_deadline(infinite.handle(), {}), Kind::kNone, 0.0, true));
  boolean.with_integer("wisp_slo_ms", 1).parameters[0].type = TRITONSERVER_PARAMETER_BOOL;
  CHECK(is(read_deadline(boolean.handle(), {}), Kind::kNone, 0.0, true));
}

}  // namespace

void check_requests() {
  check_sizes();
  check_absurd_sizes();
  check_context_values();
  check_deadlines();
  check_malformed_deadlines();
}
