// Costs, the profile file, and a file that changes while the model is loaded.
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "batcher.h"
#include "check.h"
#include "profile.h"
#include "text.h"

namespace wisp_test {

std::string profile_text(double base_s, double margin) {
  char numbers[256];
  std::snprintf(numbers, sizeof numbers, R"("costs":{"memory":[%.17g,0,0,0,0,0],"arithmetic":[0,0,3e-4,0,0,0],)"
                                         R"("norm":4.0},"margin":%.17g,)", base_s, margin);
  return R"({"schema":1,"features":["passes","sessions","new_tokens","choices","new_x_context","context"],)" +
         std::string(numbers) +
         R"("noise":0.05,"fingerprint":{"model":"m","model_hash":"h","dtype":"float32","device":"d","num_threads":1,)"
         R"("versions":{"torch":"2"}},"measured":{"num_passes":1,"num_repeats":1,"repeat_noise":0.1,"fit_error":0.1,)"
         R"("seconds":1.0,"created":"2026","wisp":"0"}})";
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream(path + "~") << text;
  std::filesystem::rename(path + "~", path);
}

}  // namespace wisp_test

namespace {

using wisp_test::profile_text;

constexpr unsigned kLongest_s = 60;  // a check that waits for ever is ended by the alarm

std::string refusal(std::string text, const std::string& old_part, const std::string& new_part) {
  text.replace(text.find(old_part), old_part.size(), new_part);
  try {
    wisp::parse_profile(text);
    return "accepted";
  } catch (const wisp::ConfigError& error) {
    return error.what();
  }
}

void check_malformed() {
  const std::string good = profile_text(0.03);
  const std::pair<std::string, std::pair<std::string, std::string>> cases[] = {
      {"\"schema\":1", {"\"schema\":2", "schema must be 1"}},
      {"\"schema\":1", {"\"schema\":true", "schema must be 1"}},
      {"\"schema\":1,", {"", "schema must be 1"}},
      {"\"schema\":1,", {"\"schema\":1,\"more\":1,", "\"more\" is unknown"}},
      {"\"sessions\",", {"", "features are not those"}},
      {"\"sessions\"", {"\"seats\"", "features are not those"}},
      {"\"norm\":4.0", {"\"norm\":0.5", "costs.norm must be 1 to 32"}},
      {"\"norm\":4.0", {"\"norm\":33", "costs.norm must be 1 to 32"}},
      {"\"norm\":4.0", {"\"norm\":\"4\"", "costs.norm must be a number"}},
      {"\"norm\":4.0", {"\"more\":4.0", "costs.norm is missing"}},
      {"3e-4", {"-3e-4", "costs.arithmetic must be 6 prices, each 0 to 1e9 s"}},
      {"3e-4", {"1e999", "a number is out of range"}},
      {"3e-4", {"NaN", "not JSON"}},
      {"3e-4", {"null", "costs.arithmetic must be"}},
      {"[0,0,3e-4", {"[0,3e-4", "costs.arithmetic must be"}},
      {"\"margin\":1.25", {"\"margin\":0", "margin must be a positive number"}},
      {"\"margin\":1.25,", {"", "margin is missing"}},
      {"\"noise\":0.05", {"\"noise\":-1", "noise must be a positive number"}},
      {"\"num_threads\":1", {"\"num_threads\":1.5", "fingerprint.num_threads must be an integer"}},
      {"\"torch\":\"2\"", {"\"torch\":2", "fingerprint.versions must hold strings"}},
      {"\"created\":\"2026\",", {"", "measured.created is missing"}},
  };
  for (const auto& each : cases) CHECK_HAS(refusal(good, each.first, each.second.first), each.second.second);
  CHECK_HAS(refusal(good, "3e-4", "0"), "accepted");
  CHECK_HAS(refusal(profile_text(0.0), "3e-4", "0"), "cost something");
  CHECK_HAS(refusal(good + " x", "3e-4", "0"), "behind its end");
}

// Costs while the file changes; every change is looked at, whatever the clock says.
void check_reload(const std::string& folder) {
  const std::string path = folder + "/profile.json";
  wisp_test::write_file(path, profile_text(0.03));
  wisp::CostSource source(path, std::nullopt);
  CHECK(source.costs().memory[0] == 0.03 && source.costs().margin == 1.25);
  std::int64_t now_ms = 10;
  source.refresh(now_ms);
  wisp_test::write_file(path, profile_text(0.04, 1.5));
  source.refresh(now_ms + wisp::CostSource::kLookEvery_ms - 1);
  CHECK(source.costs().memory[0] == 0.03);  // too early to look
  fakes::taken_log();
  source.refresh(now_ms += wisp::CostSource::kLookEvery_ms);
  CHECK(source.costs().memory[0] == 0.04 && source.costs().margin == 1.5);
  CHECK(fakes::taken_log().size() == 1);
  wisp_test::write_file(path, "{");
  for (int i = 0; i < 3; ++i) source.refresh(now_ms += wisp::CostSource::kLookEvery_ms);
  std::filesystem::remove(path);
  for (int i = 0; i < 3; ++i) source.refresh(now_ms += wisp::CostSource::kLookEvery_ms);
  const auto log = fakes::taken_log();
  CHECK(source.costs().memory[0] == 0.04 && log.size() == 2);
  CHECK_HAS(log[0], "is malformed: it is not JSON; the old costs stay in use");
  CHECK_HAS(log[1], "cannot be read");
  wisp_test::write_file(path, profile_text(0.05));
  source.refresh(now_ms += wisp::CostSource::kLookEvery_ms);
  CHECK(source.costs().memory[0] == 0.05);
  const wisp::CostSource own_margin(path, 2.0);
  CHECK(own_margin.costs().margin == 2.0);
}

// What is no regular file is not opened: the batcher's thread would wait in a FIFO for somebody who writes.
void check_irregular(const std::string& folder) {
  const std::string path = folder + "/irregular.json";
  alarm(kLongest_s);
  CHECK(mkfifo(path.c_str(), 0600) == 0);
  try {
    const wisp::CostSource source(path, std::nullopt);
    CHECK(!"a FIFO is a profile");
  } catch (const wisp::ConfigError& error) {
    CHECK_HAS(error.what(), "is no regular file");
  }
  wisp_test::write_file(path, profile_text(0.03));
  wisp::CostSource source(path, std::nullopt);
  std::int64_t now_ms = 10;
  source.refresh(now_ms);
  fakes::taken_log();
  CHECK(std::filesystem::remove(path) && mkfifo(path.c_str(), 0600) == 0);
  for (int i = 0; i < 3; ++i) source.refresh(now_ms += wisp::CostSource::kLookEvery_ms);
  CHECK(std::filesystem::remove(path) && std::filesystem::create_directory(path));
  for (int i = 0; i < 3; ++i) source.refresh(now_ms += wisp::CostSource::kLookEvery_ms);
  const auto log = fakes::taken_log();
  CHECK(source.costs().memory[0] == 0.03 && log.size() == 2);
  for (const std::string& line : log) CHECK_HAS(line, "is no regular file; allowed: the path of a profile");
  for (const std::string& line : log) CHECK_HAS(line, "; the old costs stay in use");
  CHECK(std::filesystem::remove(path));
  alarm(0);
}

void check_loaded(const std::string& folder) {
  wisp_test::write_file(folder + "/profile.json", profile_text(0.03));
  wisp_test::Loaded loaded({{"WISP_PROFILE", "profile.json"}}, folder);
  wisp_test::write_file(folder + "/bad.json", "[]");
  fakes::Model model{fakes::model_config({{"WISP_PROFILE", "bad.json"}}), folder};
  TRITONBACKEND_Batcher* batcher = nullptr;
  CHECK_HAS(fakes::taken_message(TRITONBACKEND_ModelBatcherInitialize(&batcher, model.handle())), "no JSON object");
  wisp_test::write_file(folder + "/bad.json", std::string((1 << 20) + 1, ' '));
  CHECK_HAS(fakes::taken_message(TRITONBACKEND_ModelBatcherInitialize(&batcher, model.handle())), "1 MiB");
  model.config_json = fakes::model_config({{"WISP_PROFILE", "."}});
  CHECK_HAS(fakes::taken_message(TRITONBACKEND_ModelBatcherInitialize(&batcher, model.handle())),
            "/.\" is no regular file; allowed: the path of a profile");
}

}  // namespace

void check_costs() {
  const wisp::Features item = wisp::item_features({100.0, 9.0, 8.0});
  CHECK(item == (wisp::Features{0.0, 1.0, 9.0, 8.0, 9.0 * 105.0, 109.0}));
  wisp::CostModel costs{{0.03, 0, 0, 0, 0, 0}, {0, 0, 0.004, 0, 0, 0}, 1.0, 1.0};
  wisp::Features batch = wisp::kEmptyPass;
  wisp::add(batch, wisp::item_features({0.0, 10.0, 1.0}));
  CHECK(std::abs(costs.predict_s(batch) - 0.07) < 1e-15);
  costs.norm = 2.0;
  CHECK(std::abs(costs.predict_s(batch) - 0.05) < 1e-15);
  costs.norm = 32.0;
  CHECK(std::abs(costs.predict_s(batch) - 0.04) < 1e-5);
}

void check_profile(const std::string& folder) {
  check_malformed();
  check_reload(folder);
  check_irregular(folder);
  check_loaded(folder);
}
