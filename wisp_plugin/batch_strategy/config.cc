#include "config.h"

#include <array>
#include <map>

#include "json.h"
#include "text.h"

namespace wisp {
namespace {

constexpr std::array<const char*, 8> kAllowed = {
    "WISP_PROFILE",      "WISP_BASE_US",       "WISP_PER_TOKEN_US", "WISP_PER_CONTEXT_US",
    "WISP_TOKENS_INPUT", "WISP_CONTEXT_INPUT", "WISP_SLO_MS",       "WISP_MARGIN"};
constexpr double kMicrosecond_s = 1e-6;
constexpr const char* kCostsAllowed =
    "allowed: either WISP_PROFILE, or WISP_BASE_US, WISP_PER_TOKEN_US and WISP_PER_CONTEXT_US (absent ones are 0)";

using Texts = std::map<std::string, std::string>;

Texts wisp_parameters(const picojson::value& config) {
  Texts result;
  const picojson::value& parameters = config.get("parameters");
  if (!parameters.is<picojson::object>()) return result;
  for (const auto& entry : parameters.get<picojson::object>()) {
    if (entry.first.rfind("WISP_", 0) != 0) continue;
    bool known = false;
    std::string allowed;
    for (const char* name : kAllowed) {
      known = known || entry.first == name;
      allowed += (allowed.empty() ? "" : ", ") + std::string(name);
    }
    if (!known) throw ConfigError("parameter " + quoted(entry.first) + " is unknown; allowed: " + allowed);
    const bool has_text = entry.second.is<picojson::object>() && entry.second.get("string_value").is<std::string>();
    result[entry.first] = has_text ? entry.second.get("string_value").get<std::string>() : "";
  }
  return result;
}

enum class Range { kFromZero, kPositive };

std::optional<double> number(const Texts& texts, const std::string& name, Range range) {
  const auto found = texts.find(name);
  if (found == texts.end()) return std::nullopt;
  const std::optional<double> value = parse_number(found->second);
  if (!value || *value < 0.0 || (range == Range::kPositive && *value == 0.0)) {
    throw ConfigError(name + " is " + quoted(found->second) + "; allowed: a " +
                      (range == Range::kPositive ? "number above 0" : "number from 0"));
  }
  return value;
}

void read_costs(const Texts& texts, const std::string& model_dir, Settings& settings) {
  const auto base = number(texts, "WISP_BASE_US", Range::kFromZero);
  const auto per_token = number(texts, "WISP_PER_TOKEN_US", Range::kFromZero);
  const auto per_context = number(texts, "WISP_PER_CONTEXT_US", Range::kFromZero);
  settings.margin = number(texts, "WISP_MARGIN", Range::kPositive);
  const bool has_inline = base || per_token || per_context;
  const auto profile = texts.find("WISP_PROFILE");
  if (profile != texts.end()) {
    if (has_inline) throw ConfigError(std::string("WISP_PROFILE is given and inline costs too; ") + kCostsAllowed);
    if (profile->second.empty()) throw ConfigError("WISP_PROFILE is empty; allowed: the path of a profile");
    const bool absolute = profile->second.front() == '/';
    settings.profile_path = absolute ? profile->second : model_dir + "/" + profile->second;
    return;
  }
  if (!has_inline) throw ConfigError(std::string("WISP_PROFILE is missing; ") + kCostsAllowed);
  settings.inline_costs.memory = {base.value_or(0.0) * kMicrosecond_s,
                                  0.0,
                                  per_token.value_or(0.0) * kMicrosecond_s,
                                  0.0,
                                  0.0,
                                  per_context.value_or(0.0) * kMicrosecond_s};
  if (settings.inline_costs.memory == Features{}) {
    throw ConfigError("WISP_BASE_US, WISP_PER_TOKEN_US and WISP_PER_CONTEXT_US are all 0; allowed: one above 0");
  }
  settings.inline_costs.margin = settings.margin.value_or(1.0);
}

// Names of the model's inputs with their data types (TYPE_INT32, ...).
Texts model_inputs(const picojson::value& config) {
  Texts result;
  const picojson::value& inputs = config.get("input");
  if (!inputs.is<picojson::array>()) return result;
  for (const picojson::value& input : inputs.get<picojson::array>()) {
    if (!input.is<picojson::object>() || !input.get("name").is<std::string>()) continue;
    const picojson::value& type = input.get("data_type");
    result[input.get("name").get<std::string>()] = type.is<std::string>() ? type.get<std::string>() : "";
  }
  return result;
}

void check_input(const std::string& parameter, const std::string& name, const Texts& inputs) {
  if (inputs.count(name) != 0) return;
  std::string allowed;
  for (const auto& input : inputs) allowed += (allowed.empty() ? "" : ", ") + input.first;
  throw ConfigError(parameter + " names " + quoted(name) + ", no input of the model; allowed: " + allowed);
}

void read_inputs(const Texts& texts, const Texts& inputs, SizeInputs& sizes) {
  const auto tokens = texts.find("WISP_TOKENS_INPUT");
  if (tokens != texts.end()) {
    const std::size_t comma = tokens->second.find(',');
    sizes.first_tokens = tokens->second.substr(0, comma);
    check_input("WISP_TOKENS_INPUT", sizes.first_tokens, inputs);
    if (comma != std::string::npos) {
      sizes.second_tokens = tokens->second.substr(comma + 1);
      check_input("WISP_TOKENS_INPUT", sizes.second_tokens, inputs);
      if (sizes.first_tokens == sizes.second_tokens) {
        throw ConfigError("WISP_TOKENS_INPUT names " + quoted(sizes.first_tokens) + " twice; allowed: NAME or "
                          "FIRST,SECOND");
      }
    }
  }
  const auto context = texts.find("WISP_CONTEXT_INPUT");
  if (context == texts.end()) return;
  constexpr const char* kPrefix = "value:";
  sizes.context_is_value = context->second.rfind(kPrefix, 0) == 0;
  sizes.context = sizes.context_is_value ? context->second.substr(6) : context->second;
  check_input("WISP_CONTEXT_INPUT", sizes.context, inputs);
  const std::string& type = inputs.at(sizes.context);
  if (sizes.context_is_value && type != "TYPE_INT32" && type != "TYPE_INT64") {
    throw ConfigError("WISP_CONTEXT_INPUT wants the value of " + quoted(sizes.context) + ", which is " + type +
                      "; allowed: TYPE_INT32, TYPE_INT64");
  }
}

// True for a number other than 0, or true. Triton writes 64-bit integers as numbers or as strings.
bool is_set(const picojson::value& value) {
  if (value.is<bool>()) return value.get<bool>();
  if (value.is<double>()) return value.get<double>() != 0.0;
  return value.is<std::string>() && value.get<std::string>() != "0" && !value.get<std::string>().empty();
}

bool is_one(const picojson::value& value) {
  return value.is<double>() ? value.get<double>() == 1.0 : value.is<std::string>() && value.get<std::string>() == "1";
}

const picojson::value& member(const picojson::value& value, const char* name) {
  static const picojson::value kNothing;
  return value.is<picojson::object>() ? value.get(name) : kNothing;
}

// Without a policy for its queue Triton fills batches ahead of time, request by request (see batcher.h).
Queue queue_of(const picojson::value& batching) {
  if (!batching.is<picojson::object>()) return Queue::kAhead;
  const picojson::value& levels = batching.get("priority_levels");
  const picojson::value& policy = batching.get("default_queue_policy");
  if (is_set(levels)) return is_one(levels) ? Queue::kOne : Queue::kPriority;
  const bool holds_back = is_set(member(policy, "allow_timeout_override")) ||
                          is_set(member(policy, "default_timeout_microseconds")) ||
                          is_set(member(policy, "max_queue_size"));
  return holds_back ? Queue::kOne : Queue::kAhead;
}

std::string warning_of(const picojson::value& batching, Queue queue) {
  if (!batching.is<picojson::object>()) {
    return "WISP batching strategy: dynamic_batching is not configured, so the strategy is never asked";
  }
  if (queue != Queue::kAhead) return "";
  return "WISP batching strategy: without priority_levels or a queue policy in dynamic_batching Triton adds requests "
         "one by one to batches that wait for an instance, without telling what is in them, so only requests that "
         "arrive together are judged; the strategy helps with priority_levels: 2 or more (README.md says when)";
}

}  // namespace

Settings parse_settings(const std::string& config_json, const std::string& model_dir) {
  const picojson::value config = parse_json(config_json);
  if (!config.is<picojson::object>()) throw ConfigError("the model's configuration is no JSON object");
  const Texts texts = wisp_parameters(config);
  Settings settings;
  read_costs(texts, model_dir, settings);
  if (const auto slo_ms = number(texts, "WISP_SLO_MS", Range::kPositive)) settings.default_slo_us = *slo_ms * 1000.0;
  read_inputs(texts, model_inputs(config), settings.inputs);
  const picojson::value& batching = config.get("dynamic_batching");
  settings.queue = queue_of(batching);
  settings.warning = warning_of(batching, settings.queue);
  return settings;
}

}  // namespace wisp
