// config.pbtxt: what is accepted, and one line of text for what is not.
#include "check.h"
#include "config.h"
#include "text.h"

namespace {

using Parameters = std::initializer_list<std::pair<std::string, std::string>>;

std::string refusal(Parameters parameters) {
  fakes::Model model{fakes::model_config(parameters)};
  TRITONBACKEND_Batcher* batcher = nullptr;
  const std::string message = fakes::taken_message(TRITONBACKEND_ModelBatcherInitialize(&batcher, model.handle()));
  CHECK(batcher == nullptr);
  CHECK(TRITONBACKEND_ModelBatcherFinalize(batcher) == nullptr);  // as the server does after a failure
  return message;
}

wisp::Settings settings(Parameters parameters) { return wisp::parse_settings(fakes::model_config(parameters), "/m"); }

void check_costs_given() {
  CHECK_HAS(refusal({}), "WISP_PROFILE is missing; allowed: either WISP_PROFILE, or WISP_BASE_US");
  CHECK_HAS(refusal({{"WISP_PROFILE", "p"}, {"WISP_BASE_US", "1"}}), "inline costs too");
  CHECK_HAS(refusal({{"WISP_PROFILE", ""}}), "WISP_PROFILE is empty");
  CHECK_HAS(refusal({{"WISP_PROFILE", "nowhere.json"}}), "WISP_PROFILE \"./nowhere.json\" cannot be read");
  CHECK_HAS(refusal({{"WISP_BASE_US", "0"}}), "are all 0");
  for (const char* wrong : {"", "fast", "-1", "nan", "inf", "1e999", "1 ", "0x10", "1,5"}) {
    CHECK_HAS(refusal({{"WISP_BASE_US", wrong}}), "allowed: a number from 0");
    CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_MARGIN", wrong}}), "WISP_MARGIN is ");
    CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_SLO_MS", wrong}}), "allowed: a number above 0");
  }
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_MARGIN", "0"}}), "allowed: a number above 0");
}

void check_names() {
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_TYPO", "1"}}), "\"WISP_TYPO\" is unknown; allowed: WISP_PROFILE, ");
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_TOKENS_INPUT", "X"}}), "allowed: DRAFT, PREFIX, TEXT, TOKENS");
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_TOKENS_INPUT", ""}}), "WISP_TOKENS_INPUT names \"\"");
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_TOKENS_INPUT", "TOKENS,DRAFT,TEXT"}}), "names \"DRAFT,TEXT\"");
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_TOKENS_INPUT", "DRAFT,DRAFT"}}), "twice");
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_CONTEXT_INPUT", "value:X"}}), "WISP_CONTEXT_INPUT names \"X\"");
  CHECK_HAS(refusal({{"WISP_BASE_US", "1"}, {"WISP_CONTEXT_INPUT", "value:TEXT"}}), "allowed: TYPE_INT32, TYPE_INT64");
}

void check_accepted() {
  const auto some = settings({{"WISP_BASE_US", "2e3"}, {"WISP_PER_CONTEXT_US", "0.5"}, {"WISP_MARGIN", "1.5"},
                              {"WISP_SLO_MS", "40"}, {"WISP_TOKENS_INPUT", "TOKENS,DRAFT"},
                              {"WISP_CONTEXT_INPUT", "value:PREFIX"}, {"OTHER", "1"}});
  CHECK(some.inline_costs.memory == (wisp::Features{2e3 * 1e-6, 0, 0, 0, 0, 0.5 * 1e-6}));
  CHECK(some.inline_costs.margin == 1.5 && some.default_slo_us == 40'000.0);
  CHECK(some.inputs.first_tokens == "TOKENS" && some.inputs.second_tokens == "DRAFT");
  CHECK(some.inputs.context == "PREFIX" && some.inputs.context_is_value && some.warning.empty());
  CHECK(settings({{"WISP_PROFILE", "1/p.json"}}).profile_path == "/m/1/p.json");
  CHECK(settings({{"WISP_PROFILE", "/p.json"}}).profile_path == "/p.json");
}

void check_rest_of_config() {
  const std::string costs = R"("parameters":{"WISP_BASE_US":{"string_value":"1"}})";
  CHECK_HAS(wisp::parse_settings("{" + costs + "}", ".").warning, "dynamic_batching is not configured");
  CHECK_HAS(wisp::parse_settings(R"({"dynamic_batching":{},)" + costs + "}", ".").warning, "priority_levels: 2 or");
  const std::string sized = R"({"dynamic_batching":{"default_queue_policy":{"max_queue_size":9}},)";
  CHECK(wisp::parse_settings(sized + costs + "}", ".").warning.empty());
  const auto queue = [&](const std::string& batching) {
    return wisp::parse_settings(R"({"dynamic_batching":{)" + batching + "}," + costs + "}", ".").queue;
  };
  for (const char* ahead : {"", R"("priority_levels":"0")", R"("default_queue_policy":{"max_queue_size":0})"}) {
    CHECK(queue(ahead) == wisp::Queue::kAhead);
  }
  for (const char* one : {R"("priority_levels":1)", R"("default_queue_policy":{"allow_timeout_override":true})",
                          R"("default_queue_policy":{"default_timeout_microseconds":"5"})"}) {
    CHECK(queue(one) == wisp::Queue::kOne);
  }
  for (const char* levels : {R"("priority_levels":2)", R"("priority_levels":"3","default_queue_policy":{})"}) {
    CHECK(queue(levels) == wisp::Queue::kPriority);
  }
  fakes::Model model{R"({"parameters":{"WISP_BASE_US":{"string_value":"1"}}})"};
  TRITONBACKEND_Batcher* batcher = nullptr;
  fakes::taken_log();
  CHECK(TRITONBACKEND_ModelBatcherInitialize(&batcher, model.handle()) == nullptr);
  CHECK(fakes::taken_log().size() == 1);
  TRITONBACKEND_ModelBatcherFinalize(batcher);
  for (const char* wrong : {"", "[]", "{", "{} x", R"({"parameters":{"WISP_BASE_US":7}})"}) {
    fakes::Model broken{wrong};
    CHECK(!fakes::taken_message(TRITONBACKEND_ModelBatcherInitialize(&batcher, broken.handle())).empty());
  }
}

void check_api_version() {
  for (const auto& version : {std::pair{2U, 17U}, std::pair{1U, 16U}, std::pair{0U, 99U}}) {
    fakes::set_api_version(version.first, version.second);
    CHECK_HAS(refusal({{"WISP_BASE_US", "1"}}), "needs backend API 1.17");
  }
  fakes::set_api_version(1, 17);
  wisp_test::Loaded loaded({{"WISP_BASE_US", "1"}});
}

}  // namespace

void check_config() {
  check_costs_given();
  check_names();
  check_accepted();
  check_rest_of_config();
  check_api_version();
}
