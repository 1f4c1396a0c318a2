// What a model's config.pbtxt says to the strategy: the parameters WISP_*.
#pragma once

#include <optional>
#include <string>

#include "cost_model.h"

namespace wisp {

// Which inputs of a request tell its size. Empty names: not configured.
struct SizeInputs {
  std::string first_tokens;
  std::string second_tokens;
  std::string context;
  bool context_is_value = false;  // the input's one integer is the number of tokens, not its length
};

// How Triton fills batches, by the configuration of its queue.
enum class Queue {
  kAhead,     // ahead of time, one request after the other (no queue policy)
  kOne,       // for a free instance, from one queue
  kPriority,  // for a free instance, the urgent first
};

struct Settings {
  SizeInputs inputs;
  std::string profile_path;               // empty: inline costs
  CostModel inline_costs;                 // without a profile
  std::optional<double> margin;           // WISP_MARGIN
  std::optional<double> default_slo_us;   // WISP_SLO_MS
  Queue queue = Queue::kAhead;
  std::string warning;                    // one line about the rest of config.pbtxt; empty if there is nothing to say
};

// Settings in a model's configuration as Triton serializes it. `model_dir`: relative paths start there.
// Raises ConfigError with one line that names the parameter and says what is allowed.
Settings parse_settings(const std::string& config_json, const std::string& model_dir);

}  // namespace wisp
