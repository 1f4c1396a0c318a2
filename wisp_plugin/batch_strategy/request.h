// What a request says about its size and its deadline, read through Triton's API without allocating.
#pragma once

#include <optional>

#include "config.h"
#include "cost_model.h"
#include "triton_api.h"

namespace wisp {

// Beyond this many a count is not believed: sums of products of such counts stay good numbers.
inline constexpr double kMaxCount = 1e9;

// Without configured inputs the batch dimension of the first input counts as new tokens. A missing input counts 0.
RequestSize read_size(TRITONBACKEND_Request* request, const SizeInputs& inputs) noexcept;

struct DeadlineTold {
  enum class Kind { kNone, kAbsolute, kRelative };  // relative: to when the request was first seen
  Kind kind = Kind::kNone;
  double us = 0.0;  // unix time, or a duration
  bool malformed = false;  // a parameter was there but was no positive number; the next source was taken
};

// In this order: wisp_deadline_us, wisp_slo_ms, `default_slo_us`, Triton's request timeout.
DeadlineTold read_deadline(TRITONBACKEND_Request* request, std::optional<double> default_slo_us) noexcept;

}  // namespace wisp
