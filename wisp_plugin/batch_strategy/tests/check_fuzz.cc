// Random requests over several threads, and batchers that come and go.
#include <atomic>
#include <fstream>
#include <limits>
#include <random>
#include <thread>
#include <unistd.h>

#include "check.h"

namespace {

using wisp_test::Loaded;
constexpr int kNumThreads = 4;

std::int64_t any_integer(std::mt19937_64& random) {
  static constexpr std::int64_t kOdd[] = {0, 1, -1, std::numeric_limits<std::int64_t>::max(),
                                          std::numeric_limits<std::int64_t>::min(), 1'700'000'000'000'000};
  if (random() % 2 == 0) return kOdd[random() % std::size(kOdd)];
  return static_cast<std::int64_t>(random() >> (random() % 64));
}

void add_parameter(fakes::Request& request, std::mt19937_64& random) {
  static constexpr const char* kKeys[] = {"wisp_deadline_us", "wisp_slo_ms", "other", ""};
  static constexpr const char* kTexts[] = {"", "nan", "-inf", "1e308", "1e309", "40", "1.8e15", "\xff\xfe", "4,5"};
  const std::string key = kKeys[random() % std::size(kKeys)];
  switch (random() % 5) {
    case 0: request.with_integer(key, any_integer(random)); break;
    case 1: request.with_number(key, static_cast<double>(any_integer(random)) * 1.7); break;
    case 2: request.with_number(key, std::numeric_limits<double>::quiet_NaN()); break;
    case 3: request.with_text(key, kTexts[random() % std::size(kTexts)]); break;
    default: request.with_integer(key, 40).parameters.back().type = TRITONSERVER_PARAMETER_BYTES;
  }
}

fakes::Request any_request(std::mt19937_64& random) {
  fakes::Request request;
  for (const char* name : {"TOKENS", "DRAFT", "PREFIX"}) {
    const auto kind = random() % 6;
    if (kind == 0) continue;
    if (kind == 1) {
      request.with_value(name, any_integer(random), random() % 2 ? TRITONSERVER_TYPE_INT64 : TRITONSERVER_TYPE_INT32);
      if (random() % 4 == 0) request.inputs.back().data.resize(random() % 9);
    } else {
      request.with_input(name, {1, kind == 2 ? any_integer(random) : static_cast<std::int64_t>(random() % 50)});
      if (random() % 8 == 0) request.inputs.back().shape.resize(random() % 5, any_integer(random));
    }
    if (random() % 50 == 0) request.inputs.back().broken = true;
    if (random() % 50 == 0) request.inputs.back().memory = TRITONSERVER_MEMORY_GPU;
  }
  for (auto count = random() % 4; count > 0; --count) add_parameter(request, random);
  if (random() % 3 == 0) request.timeout_us = static_cast<std::uint64_t>(any_integer(random));
  return request;
}

void ask_many(const Loaded& loaded, int num_requests, unsigned seed, std::atomic<int>& num_taken,
              std::atomic<int>& num_refused) {
  std::mt19937_64 random(seed);
  for (int asked = 0; asked < num_requests;) {
    void* batch = loaded.begin();
    std::vector<fakes::Request> requests(random() % 40);
    for (auto& request : requests) {
      request = any_request(random);
      ++asked;
      ++(wisp_test::ask(batch, request) ? num_taken : num_refused);
    }
    if (random() % 64 != 0) wisp_test::finish(batch);
  }
}

void fuzz(int num_requests, int levels) {
  // With an SLO some are refused however busy the machine is; requests with a timeout alone may all be late.
  const Loaded loaded({{"WISP_BASE_US", "100"}, {"WISP_SLO_MS", "40"}, {"WISP_PER_TOKEN_US", "300"},
                       {"WISP_PER_CONTEXT_US", "0.1"}, {"WISP_TOKENS_INPUT", "TOKENS,DRAFT"},
                       {"WISP_CONTEXT_INPUT", "value:PREFIX"}}, ".", levels);
  std::atomic<int> num_taken{0}, num_refused{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kNumThreads; ++i) {
    threads.emplace_back([&, i] { ask_many(loaded, num_requests / kNumThreads, i, num_taken, num_refused); });
  }
  for (auto& thread : threads) thread.join();
  CHECK(num_taken > 0 && num_refused > 0);
}

std::int64_t resident_kib() {
  std::int64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

}  // namespace

void check_fuzz(int num_requests) {
  for (const int levels : {0, 2}) fuzz(num_requests / 2, levels);
}

void check_growth(const std::string& folder) {
  wisp_test::write_file(folder + "/profile.json", wisp_test::profile_text(0.03));
  fakes::Model wrong{fakes::model_config({{"WISP_PROFILE", "nowhere"}}), folder};
  std::int64_t settled_kib = 0;
  for (int i = 0; i < 200; ++i) {
    if (i == 20) settled_kib = resident_kib();
    const Loaded loaded({{"WISP_PROFILE", "profile.json"}, {"WISP_SLO_MS", "40"}}, folder);
    fakes::Request request;
    wisp_test::ask(loaded.begin(), request);
    TRITONBACKEND_Batcher* batcher = nullptr;
    CHECK(!fakes::taken_message(TRITONBACKEND_ModelBatcherInitialize(&batcher, wrong.handle())).empty());
  }
  // A batcher has about 130 KiB; sanitizers keep freed memory for a while, and look for leaks by themselves.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(resident_kib() - settled_kib < 1024);
#else
  CHECK(settled_kib > 0);
#endif
}
