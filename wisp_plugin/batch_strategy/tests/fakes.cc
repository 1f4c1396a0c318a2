#include "fakes.h"

#include <atomic>
#include <mutex>
#include <utility>

struct TRITONSERVER_Error {
  TRITONSERVER_Error_Code code;
  std::string message;
};
struct TRITONSERVER_Message {
  std::string text;
};

namespace {

std::atomic<std::int64_t> live_errors{0};
std::atomic<std::uint32_t> api_major{1};
std::atomic<std::uint32_t> api_minor{19};
std::mutex log_mutex;
std::vector<std::string> log_lines;

fakes::Request& request_of(TRITONBACKEND_Request* request) { return *reinterpret_cast<fakes::Request*>(request); }
fakes::Input& input_of(TRITONBACKEND_Input* input) { return *reinterpret_cast<fakes::Input*>(input); }
fakes::Model& model_of(TRITONBACKEND_Model* model) { return *reinterpret_cast<fakes::Model*>(model); }

TRITONSERVER_Error* failure() { return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INVALID_ARG, "not there"); }

}  // namespace

namespace fakes {

Request& Request::with_input(std::string name, std::vector<std::int64_t> shape) {
  inputs.push_back({std::move(name), TRITONSERVER_TYPE_INT32, std::move(shape), {}});
  return *this;
}

Request& Request::with_value(std::string name, std::int64_t value, TRITONSERVER_DataType type) {
  Input input{std::move(name), type, {1, 1}, {}};
  const auto narrow = static_cast<std::int32_t>(value);
  const bool wide = type == TRITONSERVER_TYPE_INT64;
  input.data.resize(wide ? sizeof value : sizeof narrow);
  std::memcpy(input.data.data(), wide ? static_cast<const void*>(&value) : &narrow, input.data.size());
  inputs.push_back(std::move(input));
  return *this;
}

Request& Request::with_integer(std::string key, std::int64_t value) {
  parameters.push_back({std::move(key), TRITONSERVER_PARAMETER_INT, value, 0.0, ""});
  return *this;
}

Request& Request::with_number(std::string key, double value) {
  parameters.push_back({std::move(key), TRITONSERVER_PARAMETER_DOUBLE, 0, value, ""});
  return *this;
}

Request& Request::with_text(std::string key, std::string value) {
  parameters.push_back({std::move(key), TRITONSERVER_PARAMETER_STRING, 0, 0.0, std::move(value)});
  return *this;
}

std::string model_config(std::initializer_list<std::pair<std::string, std::string>> parameters, int priority_levels) {
  std::string json = R"({"name":"model","max_batch_size":8,"dynamic_batching":{"priority_levels":")" +
                     std::to_string(priority_levels) + R"(","default_queue_policy":)"
                     R"({"allow_timeout_override":true,"default_timeout_microseconds":"0","max_queue_size":0}},)"
                     R"("input":[)"
                     R"({"name":"TOKENS","data_type":"TYPE_INT32","dims":[-1]},)"
                     R"({"name":"DRAFT","data_type":"TYPE_INT32","dims":[-1],"optional":true},)"
                     R"({"name":"PREFIX","data_type":"TYPE_INT32","dims":[1]},)"
                     R"({"name":"TEXT","data_type":"TYPE_STRING","dims":[1]}],"parameters":{)";
  bool first = true;
  for (const auto& parameter : parameters) {
    json += (first ? "\"" : ",\"") + parameter.first + R"(":{"string_value":")" + parameter.second + "\"}";
    first = false;
  }
  return json + "}}";
}

std::string taken_message(TRITONSERVER_Error* error) {
  if (error == nullptr) return "";
  const std::string message = TRITONSERVER_ErrorMessage(error);
  TRITONSERVER_ErrorDelete(error);
  return message;
}

void set_api_version(std::uint32_t major, std::uint32_t minor) {
  api_major = major;
  api_minor = minor;
}

std::vector<std::string> taken_log() {
  const std::lock_guard<std::mutex> lock(log_mutex);
  return std::exchange(log_lines, {});
}

std::int64_t num_live_errors() { return live_errors; }

}  // namespace fakes

extern "C" {

TRITONSERVER_Error* TRITONSERVER_ErrorNew(TRITONSERVER_Error_Code code, const char* message) {
  ++live_errors;
  return new TRITONSERVER_Error{code, message};
}

void TRITONSERVER_ErrorDelete(TRITONSERVER_Error* error) {
  --live_errors;
  delete error;
}

const char* TRITONSERVER_ErrorMessage(TRITONSERVER_Error* error) { return error->message.c_str(); }

TRITONSERVER_Error* TRITONSERVER_LogMessage(TRITONSERVER_LogLevel, const char*, const int, const char* message) {
  const std::lock_guard<std::mutex> lock(log_mutex);
  log_lines.emplace_back(message);
  return nullptr;
}

TRITONSERVER_Error* TRITONSERVER_MessageSerializeToJson(TRITONSERVER_Message* message, const char** base,
                                                        std::size_t* byte_size) {
  *base = message->text.data();
  *byte_size = message->text.size();
  return nullptr;
}

TRITONSERVER_Error* TRITONSERVER_MessageDelete(TRITONSERVER_Message* message) {
  delete message;
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_ApiVersion(std::uint32_t* major, std::uint32_t* minor) {
  *major = api_major;
  *minor = api_minor;
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_ModelConfig(TRITONBACKEND_Model* model, const std::uint32_t,
                                              TRITONSERVER_Message** config) {
  *config = new TRITONSERVER_Message{model_of(model).config_json};
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_ModelRepository(TRITONBACKEND_Model* model, TRITONBACKEND_ArtifactType* kind,
                                                  const char** location) {
  *kind = TRITONBACKEND_ARTIFACT_FILESYSTEM;
  *location = model_of(model).folder.c_str();
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_RequestInputCount(TRITONBACKEND_Request* request, std::uint32_t* count) {
  *count = static_cast<std::uint32_t>(request_of(request).inputs.size());
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_RequestInputByIndex(TRITONBACKEND_Request* request, const std::uint32_t index,
                                                      TRITONBACKEND_Input** input) {
  auto& inputs = request_of(request).inputs;
  if (index >= inputs.size()) return failure();
  *input = reinterpret_cast<TRITONBACKEND_Input*>(&inputs[index]);
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_InputProperties(TRITONBACKEND_Input* handle, const char** name,
                                                  TRITONSERVER_DataType* datatype, const std::int64_t** shape,
                                                  std::uint32_t* dims_count, std::uint64_t* byte_size,
                                                  std::uint32_t* buffer_count) {
  const fakes::Input& input = input_of(handle);
  if (input.broken) return failure();
  *name = input.name.c_str();
  *datatype = input.type;
  *shape = input.shape.data();
  *dims_count = static_cast<std::uint32_t>(input.shape.size());
  *byte_size = input.data.size();
  *buffer_count = input.data.empty() ? 0 : 1;
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_InputBuffer(TRITONBACKEND_Input* handle, const std::uint32_t index,
                                              const void** buffer, std::uint64_t* byte_size,
                                              TRITONSERVER_MemoryType* memory_type, std::int64_t* memory_type_id) {
  const fakes::Input& input = input_of(handle);
  if (input.broken || index != 0 || input.data.empty()) return failure();
  *buffer = input.data.data();
  *byte_size = input.data.size();
  *memory_type = input.memory;
  *memory_type_id = 0;
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_RequestParameterCount(TRITONBACKEND_Request* request, std::uint32_t* count) {
  *count = static_cast<std::uint32_t>(request_of(request).parameters.size());
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_RequestParameter(TRITONBACKEND_Request* request, const std::uint32_t index,
                                                   const char** key, TRITONSERVER_ParameterType* type,
                                                   const void** value) {
  auto& parameters = request_of(request).parameters;
  if (index >= parameters.size()) return failure();
  const fakes::Parameter& parameter = parameters[index];
  *key = parameter.key.c_str();
  *type = parameter.type;
  *value = parameter.type == TRITONSERVER_PARAMETER_STRING   ? static_cast<const void*>(parameter.text.c_str())
           : parameter.type == TRITONSERVER_PARAMETER_DOUBLE ? static_cast<const void*>(&parameter.number)
                                                             : static_cast<const void*>(&parameter.integer);
  return nullptr;
}

TRITONSERVER_Error* TRITONBACKEND_InferenceRequestTimeoutMicroseconds(TRITONBACKEND_Request* request,
                                                                      std::uint64_t* timeout_us) {
  *timeout_us = request_of(request).timeout_us;
  return nullptr;
}

}  // extern "C"
