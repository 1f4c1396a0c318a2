// A check that says where it failed, and the list of checks.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "fakes.h"

#define CHECK(condition)                                                                    \
  do {                                                                                      \
    if (!(condition)) {                                                                     \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);        \
      std::exit(1);                                                                         \
    }                                                                                       \
  } while (false)

#define CHECK_HAS(text, part)                                                                             \
  do {                                                                                                    \
    const std::string text_ = (text);                                                                     \
    if (text_.find(part) == std::string::npos || text_.find('\n') != std::string::npos) {                 \
      std::fprintf(stderr, "%s:%d: no %s in: %s\n", __FILE__, __LINE__, #part, text_.c_str());            \
      std::exit(1);                                                                                       \
    }                                                                                                     \
  } while (false)

void check_config();
void check_costs();
void check_profile(const std::string& folder);
void check_requests();
void check_decisions();
void check_first_seen();
void check_server_calls();
void check_simulation(int num_random_loads);
void check_fuzz(int num_requests);
void check_growth(const std::string& folder);

namespace wisp_test {

// A valid profile; costs.memory = [`base_s`, 0, 0, 0, 0, 0].
std::string profile_text(double base_s, double margin = 1.25);
void write_file(const std::string& path, const std::string& text);  // as save_profile: beside it, then renamed

// A loaded batcher that is finalized at the end.
class Loaded {
 public:
  explicit Loaded(std::initializer_list<std::pair<std::string, std::string>> parameters, std::string folder = ".",
                  int priority_levels = 0)
      : model_{fakes::model_config(parameters, priority_levels), std::move(folder)} {
    CHECK(fakes::taken_message(TRITONBACKEND_ModelBatcherInitialize(&batcher_, model_.handle())).empty());
  }
  ~Loaded() { TRITONBACKEND_ModelBatcherFinalize(batcher_); }
  Loaded(const Loaded&) = delete;
  Loaded& operator=(const Loaded&) = delete;

  TRITONBACKEND_Batcher* handle() const { return batcher_; }
  void* begin() const {
    void* batch = nullptr;
    CHECK(TRITONBACKEND_ModelBatchInitialize(batcher_, &batch) == nullptr);
    return batch;
  }

 private:
  fakes::Model model_;
  TRITONBACKEND_Batcher* batcher_ = nullptr;
};

inline bool ask(void* batch, fakes::Request& request) {
  bool include = false;
  CHECK(TRITONBACKEND_ModelBatchIncludeRequest(request.handle(), batch, &include) == nullptr);
  return include;
}

inline void finish(void* batch) { CHECK(TRITONBACKEND_ModelBatchFinalize(batch) == nullptr); }

}  // namespace wisp_test
