// The server's side of the API, as little of it as the strategy needs: fake requests, models and errors.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "triton_api.h"

namespace fakes {

struct Input {
  std::string name;
  TRITONSERVER_DataType type = TRITONSERVER_TYPE_INT32;
  std::vector<std::int64_t> shape;
  std::vector<char> data;
  TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
  bool broken = false;  // its properties and its buffer give errors
};

struct Parameter {
  std::string key;
  TRITONSERVER_ParameterType type = TRITONSERVER_PARAMETER_INT;
  std::int64_t integer = 0;
  double number = 0.0;
  std::string text;
};

struct Request {
  std::vector<Input> inputs;
  std::vector<Parameter> parameters;
  std::uint64_t timeout_us = 0;

  TRITONBACKEND_Request* handle() { return reinterpret_cast<TRITONBACKEND_Request*>(this); }
  Request& with_input(std::string name, std::vector<std::int64_t> shape);
  Request& with_value(std::string name, std::int64_t value, TRITONSERVER_DataType type = TRITONSERVER_TYPE_INT64);
  Request& with_integer(std::string key, std::int64_t value);
  Request& with_number(std::string key, double value);
  Request& with_text(std::string key, std::string value);
};

struct Model {
  std::string config_json;
  std::string folder = ".";

  TRITONBACKEND_Model* handle() { return reinterpret_cast<TRITONBACKEND_Model*>(this); }
};

// A model's configuration as the server serializes it, with inputs TOKENS, DRAFT, PREFIX (INT32), TEXT (BYTES).
std::string model_config(std::initializer_list<std::pair<std::string, std::string>> parameters,
                         int priority_levels = 0);

// The message of an error, which is deleted; empty for none.
std::string taken_message(TRITONSERVER_Error* error);

void set_api_version(std::uint32_t major, std::uint32_t minor);

// Lines logged since the last call.
std::vector<std::string> taken_log();

std::int64_t num_live_errors();  // made and not deleted

}  // namespace fakes
