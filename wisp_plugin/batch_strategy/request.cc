#include "request.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "text.h"

namespace wisp {
namespace {

struct InputFacts {
  TRITONBACKEND_Input* handle = nullptr;
  const char* name = "";
  TRITONSERVER_DataType type = TRITONSERVER_TYPE_INVALID;
  const std::int64_t* shape = nullptr;
  std::uint32_t num_dims = 0;
  std::uint64_t num_bytes = 0;
  std::uint32_t num_buffers = 0;
};

bool read_input(TRITONBACKEND_Request* request, std::uint32_t index, InputFacts& facts) noexcept {
  return succeeded(TRITONBACKEND_RequestInputByIndex(request, index, &facts.handle)) && facts.handle != nullptr &&
         succeeded(TRITONBACKEND_InputProperties(facts.handle, &facts.name, &facts.type, &facts.shape,
                                                 &facts.num_dims, &facts.num_bytes, &facts.num_buffers)) &&
         facts.name != nullptr;
}

double num_elements(const InputFacts& input) noexcept {
  double count = 1.0;
  for (std::uint32_t i = 0; i < input.num_dims; ++i) {
    count *= static_cast<double>(std::max<std::int64_t>(input.shape[i], 0));
  }
  return std::min(count, kMaxCount);
}

// The first integer of an input in CPU memory; 0 for anything else. Buffers need not be aligned.
double first_integer(const InputFacts& input) noexcept {
  const std::size_t width = input.type == TRITONSERVER_TYPE_INT64 ? 8 : 4;
  const void* buffer = nullptr;
  std::uint64_t num_bytes = 0;
  TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
  std::int64_t memory_id = 0;
  if (input.type != TRITONSERVER_TYPE_INT64 && input.type != TRITONSERVER_TYPE_INT32) return 0.0;
  if (input.num_buffers == 0 || num_elements(input) < 1.0) return 0.0;
  if (!succeeded(TRITONBACKEND_InputBuffer(input.handle, 0, &buffer, &num_bytes, &memory, &memory_id))) return 0.0;
  if (memory == TRITONSERVER_MEMORY_GPU || buffer == nullptr || num_bytes < width) return 0.0;
  std::int64_t value = 0;
  if (width == 8) {
    std::memcpy(&value, buffer, width);
  } else {
    std::int32_t narrow = 0;
    std::memcpy(&narrow, buffer, width);
    value = narrow;
  }
  return std::clamp(static_cast<double>(value), 0.0, kMaxCount);
}

std::optional<double> parameter_value(TRITONSERVER_ParameterType type, const void* value) noexcept {
  double result = 0.0;
  if (value == nullptr) return std::nullopt;
  if (type == TRITONSERVER_PARAMETER_INT) {
    result = static_cast<double>(*static_cast<const std::int64_t*>(value));
  } else if (type == TRITONSERVER_PARAMETER_DOUBLE) {
    result = *static_cast<const double*>(value);
  } else if (type == TRITONSERVER_PARAMETER_STRING) {
    result = parse_number(static_cast<const char*>(value)).value_or(0.0);
  }
  if (!(result > 0.0 && std::isfinite(result))) return std::nullopt;
  return result;
}

}  // namespace

RequestSize read_size(TRITONBACKEND_Request* request, const SizeInputs& inputs) noexcept {
  RequestSize size;
  std::uint32_t num_inputs = 0;
  if (!succeeded(TRITONBACKEND_RequestInputCount(request, &num_inputs))) return size;
  InputFacts input;
  if (inputs.first_tokens.empty()) {
    const bool has_batch = num_inputs > 0 && read_input(request, 0, input) && input.num_dims > 0;
    size.num_new = has_batch ? std::clamp(static_cast<double>(input.shape[0]), 1.0, kMaxCount) : 1.0;
  }
  // By index: asking for a missing input by its name makes the server compose an error message.
  const bool has_names = !inputs.first_tokens.empty() || !inputs.context.empty();
  for (std::uint32_t i = 0; has_names && i < num_inputs; ++i) {
    if (!read_input(request, i, input)) continue;
    if (!inputs.first_tokens.empty() && inputs.first_tokens == input.name) size.num_new += num_elements(input);
    if (!inputs.second_tokens.empty() && inputs.second_tokens == input.name) {
      size.num_new += num_elements(input);
      size.num_choices += num_elements(input);
    }
    if (!inputs.context.empty() && inputs.context == input.name) {
      size.num_cached = inputs.context_is_value ? first_integer(input) : num_elements(input);
    }
  }
  return size;
}

DeadlineTold read_deadline(TRITONBACKEND_Request* request, std::optional<double> default_slo_us) noexcept {
  DeadlineTold told;
  std::optional<double> deadline_us;
  std::optional<double> slo_ms;
  std::uint32_t num_parameters = 0;
  if (!succeeded(TRITONBACKEND_RequestParameterCount(request, &num_parameters))) num_parameters = 0;
  for (std::uint32_t i = 0; i < num_parameters; ++i) {
    const char* key = nullptr;
    TRITONSERVER_ParameterType type = TRITONSERVER_PARAMETER_BYTES;
    const void* value = nullptr;
    if (!succeeded(TRITONBACKEND_RequestParameter(request, i, &key, &type, &value)) || key == nullptr) continue;
    const bool is_deadline = std::strcmp(key, "wisp_deadline_us") == 0;
    if (!is_deadline && std::strcmp(key, "wisp_slo_ms") != 0) continue;
    auto& wanted = is_deadline ? deadline_us : slo_ms;
    wanted = parameter_value(type, value);
    told.malformed = told.malformed || !wanted;
  }
  if (deadline_us) {
    told.kind = DeadlineTold::Kind::kAbsolute;
    told.us = *deadline_us;
    return told;
  }
  std::uint64_t timeout_us = 0;
  if (slo_ms) {
    told.us = *slo_ms * 1000.0;
  } else if (default_slo_us) {
    told.us = *default_slo_us;
  } else if (succeeded(TRITONBACKEND_InferenceRequestTimeoutMicroseconds(request, &timeout_us))) {
    told.us = static_cast<double>(timeout_us);
  }
  if (told.us > 0.0) told.kind = DeadlineTold::Kind::kRelative;
  return told;
}

}  // namespace wisp
