// Cost of a decision: ModelBatchIncludeRequest with everything it reads, against fakes of the server. The queue has
// priorities, which is the dearest. Each batch is begun, asked `kBatch` times and finished; begin and finish are in the
// figure. Prints one line of JSON.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "fakes.h"

namespace {

constexpr std::size_t kBatch = 32;
constexpr int kRounds = 20'000;

std::vector<fakes::Request> make_requests(bool relative) {
  std::vector<fakes::Request> requests(kBatch);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto now_us = std::chrono::duration_cast<std::chrono::microseconds>(now).count();
  for (std::size_t i = 0; i < kBatch; ++i) {
    const auto length = static_cast<std::int64_t>(1 + i % 9);
    requests[i].with_input("SESSION", {1, 1}).with_value("PREFIX", 100, TRITONSERVER_TYPE_INT32);
    requests[i].with_input("TOKENS", {1, 1}).with_input("DRAFT", {1, length});
    requests[i].with_text("other", "value");
    if (relative) {
      requests[i].with_integer("wisp_slo_ms", 3'600'000);
    } else {
      requests[i].with_integer("wisp_deadline_us", now_us + 3'600'000'000LL);
    }
  }
  return requests;
}

// Microseconds per decision, one value per batch, sorted.
std::vector<double> measure(bool relative) {
  fakes::Model model{fakes::model_config({{"WISP_BASE_US", "30000"}, {"WISP_PER_TOKEN_US", "300"},
                                          {"WISP_TOKENS_INPUT", "TOKENS,DRAFT"},
                                          {"WISP_CONTEXT_INPUT", "value:PREFIX"}}, 2)};
  TRITONBACKEND_Batcher* batcher = nullptr;
  if (TRITONBACKEND_ModelBatcherInitialize(&batcher, model.handle()) != nullptr) return {};
  auto requests = make_requests(relative);
  std::vector<double> result;
  for (int round = 0; round < kRounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    void* batch = nullptr;
    TRITONBACKEND_ModelBatchInitialize(batcher, &batch);
    bool include = false;
    for (auto& request : requests) TRITONBACKEND_ModelBatchIncludeRequest(request.handle(), batch, &include);
    TRITONBACKEND_ModelBatchFinalize(batch);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    result.push_back(took.count() / static_cast<double>(kBatch));
  }
  TRITONBACKEND_ModelBatcherFinalize(batcher);
  std::sort(result.begin(), result.end());
  return result;
}

}  // namespace

int main() {
  const std::vector<double> absolute = measure(false);
  const std::vector<double> relative = measure(true);
  if (absolute.empty() || relative.empty()) return 1;
  const auto at = [](const std::vector<double>& sorted, double share) {
    return sorted[static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1))];
  };
  std::printf("{\"decision_us\": %.4f, \"decision_us_p99\": %.4f, \"decision_us_first_seen\": %.4f, \"batch\": %zu, "
              "\"rounds\": %d}\n",
              at(absolute, 0.5), at(absolute, 0.99), at(relative, 0.5), kBatch, kRounds);
  return 0;
}
