#include "profile.h"

#include <sys/stat.h>

#include <cmath>
#include <fstream>
#include <initializer_list>
#include <iterator>

#include "json.h"
#include "triton_api.h"

namespace wisp {
namespace {

constexpr std::int64_t kMaxBytes = 1 << 20;
constexpr double kMaxPriceSeconds = 1e9;  // times of batches stay finite

enum class Kind { kInteger, kNumber, kText, kList, kObject };

struct Key {
  const char* name;
  Kind kind;
};

bool is_kind(const picojson::value& value, Kind kind) {
  switch (kind) {
    case Kind::kInteger: return value.is<std::int64_t>();
    case Kind::kNumber: return value.is<double>();  // also true for integers
    case Kind::kText: return value.is<std::string>();
    case Kind::kList: return value.is<picojson::array>();
    case Kind::kObject: return value.is<picojson::object>();
  }
  return false;
}

const char* in_words(Kind kind) {
  switch (kind) {
    case Kind::kInteger: return "an integer";
    case Kind::kNumber: return "a number";
    case Kind::kText: return "a string";
    case Kind::kList: return "a list";
    case Kind::kObject: return "an object";
  }
  return "?";
}

// `value` as an object with exactly the keys of `wanted`. `where`: prefix of their names in messages.
const picojson::object& checked(const picojson::value& value, const std::string& where,
                                std::initializer_list<Key> wanted) {
  if (!value.is<picojson::object>()) throw ConfigError("it is no JSON object");
  const auto& object = value.get<picojson::object>();
  for (const Key& key : wanted) {
    const auto found = object.find(key.name);
    if (found == object.end()) throw ConfigError(where + key.name + " is missing");
    if (!is_kind(found->second, key.kind)) throw ConfigError(where + key.name + " must be " + in_words(key.kind));
  }
  for (const auto& entry : object) {
    bool known = false;
    for (const Key& key : wanted) known = known || entry.first == key.name;
    if (!known) throw ConfigError(where + quoted(entry.first) + " is unknown");
  }
  return object;
}

void check_features(const picojson::array& names) {
  bool equal = names.size() == kNumFeatures;
  for (std::size_t i = 0; equal && i < kNumFeatures; ++i) {
    equal = names[i].is<std::string>() && names[i].get<std::string>() == kFeatureNames[i];
  }
  if (!equal) {
    throw ConfigError("features are not those of this version: passes, sessions, new_tokens, choices, new_x_context, "
                      "context");
  }
}

Features prices(const picojson::array& values, const std::string& name) {
  Features result = {};
  bool valid = values.size() == kNumFeatures;
  for (std::size_t i = 0; valid && i < kNumFeatures; ++i) {
    valid = values[i].is<double>();
    if (valid) result[i] = values[i].get<double>();
    valid = valid && result[i] >= 0.0 && result[i] <= kMaxPriceSeconds;
  }
  if (!valid) throw ConfigError("costs." + name + " must be 6 prices, each 0 to 1e9 s");
  return result;
}

double positive(const picojson::object& object, const std::string& name) {
  const double value = object.at(name).get<double>();
  if (!(value > 0.0 && std::isfinite(value))) throw ConfigError(name + " must be a positive number");
  return value;
}

void check_origin(const picojson::object& top) {
  const auto& origin = checked(top.at("fingerprint"), "fingerprint.",
                               {{"model", Kind::kText}, {"model_hash", Kind::kText}, {"dtype", Kind::kText},
                                {"device", Kind::kText}, {"num_threads", Kind::kInteger},
                                {"versions", Kind::kObject}});
  for (const auto& version : origin.at("versions").get<picojson::object>()) {
    if (!version.second.is<std::string>()) throw ConfigError("fingerprint.versions must hold strings");
  }
  checked(top.at("measured"), "measured.",
          {{"num_passes", Kind::kInteger}, {"num_repeats", Kind::kInteger}, {"repeat_noise", Kind::kNumber},
           {"fit_error", Kind::kNumber}, {"seconds", Kind::kNumber}, {"created", Kind::kText},
           {"wisp", Kind::kText}});
}

std::optional<FileStamp> stamp_of(const std::string& path) noexcept {
  struct stat status = {};
  if (stat(path.c_str(), &status) != 0) return std::nullopt;
  return FileStamp{std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec,
                   std::int64_t{status.st_size}, status.st_ino, S_ISREG(status.st_mode)};
}

}  // namespace

CostModel parse_profile(const std::string& text) {
  const picojson::value document = parse_json(text);
  if (!document.is<picojson::object>()) throw ConfigError("it is no JSON object");
  const picojson::value& schema = document.get("schema");
  if (!schema.is<std::int64_t>() || schema.get<std::int64_t>() != 1) {
    throw ConfigError("schema must be 1, the one that this version reads");
  }
  const auto& top = checked(document, "",
                            {{"schema", Kind::kInteger}, {"features", Kind::kList}, {"fingerprint", Kind::kObject},
                             {"costs", Kind::kObject}, {"margin", Kind::kNumber}, {"noise", Kind::kNumber},
                             {"measured", Kind::kObject}});
  check_features(top.at("features").get<picojson::array>());
  check_origin(top);
  const auto& costs = checked(top.at("costs"), "costs.",
                              {{"memory", Kind::kList}, {"arithmetic", Kind::kList}, {"norm", Kind::kNumber}});
  CostModel result;
  result.memory = prices(costs.at("memory").get<picojson::array>(), "memory");
  result.arithmetic = prices(costs.at("arithmetic").get<picojson::array>(), "arithmetic");
  result.norm = costs.at("norm").get<double>();
  if (!(result.norm >= 1.0 && result.norm <= kMaxNorm)) throw ConfigError("costs.norm must be 1 to 32");
  if (result.memory == Features{} && result.arithmetic == Features{}) {
    throw ConfigError("a pass has to cost something: all of costs.memory and costs.arithmetic are 0");
  }
  result.margin = positive(top, "margin");
  positive(top, "noise");
  return result;
}

CostSource::CostSource(std::string profile_path, std::optional<double> margin)
    : path_(std::move(profile_path)), margin_(margin), stamp_(stamp_of(path_)), costs_(load()) {}

CostModel CostSource::costs() const noexcept {
  const std::lock_guard<std::mutex> lock(copying_);
  return costs_;
}

void CostSource::refresh(std::int64_t now_ms) noexcept {
  if (path_.empty() || now_ms < next_look_ms_.load(std::memory_order_relaxed)) return;
  const std::unique_lock<std::mutex> lock(looking_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  next_look_ms_.store(now_ms + kLookEvery_ms, std::memory_order_relaxed);
  look();
}

void CostSource::look() noexcept {
  // The stamp is taken before reading: a change in between is found at the next look.
  const std::optional<FileStamp> stamp = stamp_of(path_);
  if (stamp == stamp_) return;
  stamp_ = stamp;
  try {
    const CostModel fresh = load();
    {
      const std::lock_guard<std::mutex> lock(copying_);
      costs_ = fresh;
    }
    log_line(TRITONSERVER_LOG_INFO, ("WISP_PROFILE: new costs from " + quoted(path_)).c_str());
  } catch (const std::exception& error) {
    try {
      log_line(TRITONSERVER_LOG_WARN, (std::string(error.what()) + "; the old costs stay in use").c_str());
    } catch (...) {  // no memory for a message: nothing to say then
    }
  } catch (...) {
  }
}

CostModel CostSource::load() const {
  const std::string name = "WISP_PROFILE " + quoted(path_);
  const std::string allowed = "; allowed: the path of a profile, absolute or relative to the model's directory";
  // Before it is opened: to open a FIFO would wait for somebody who writes into it.
  const std::optional<FileStamp> stamp = stamp_of(path_);
  if (stamp && !stamp->is_regular) throw ConfigError(name + " is no regular file" + allowed);
  std::ifstream file;
  if (stamp) file.open(path_, std::ios::binary);
  if (!file.is_open()) throw ConfigError(name + " cannot be read" + allowed);
  if (stamp->num_bytes > kMaxBytes) throw ConfigError(name + " is larger than a profile can be (1 MiB)");
  try {
    CostModel costs = parse_profile({std::istreambuf_iterator<char>(file), {}});
    if (margin_) costs.margin = *margin_;
    return costs;
  } catch (const std::exception& error) {
    throw ConfigError(name + " is malformed: " + error.what());
  }
}

}  // namespace wisp
