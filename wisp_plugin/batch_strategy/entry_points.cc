// The five functions that Triton looks up in a batching strategy library.
#include <exception>
#include <new>
#include <string>

#include "batcher.h"
#include "text.h"
#include "triton_api.h"

namespace wisp {
namespace {

TRITONSERVER_Error* check_api_version() {
  std::uint32_t major = 0;
  std::uint32_t minor = 0;
  if (TRITONSERVER_Error* error = TRITONBACKEND_ApiVersion(&major, &minor)) return error;
  if (major == kApiMajor && minor >= kApiMinor) return nullptr;
  const std::string message = "the WISP batching strategy needs backend API " + std::to_string(kApiMajor) + "." +
                              std::to_string(kApiMinor) + " or a later " + std::to_string(kApiMajor) +
                              ".x; this server has " + std::to_string(major) + "." + std::to_string(minor);
  return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNSUPPORTED, message.c_str());
}

TRITONSERVER_Error* read_config(TRITONBACKEND_Model* model, std::string& config_json) {
  TRITONSERVER_Message* message = nullptr;
  if (TRITONSERVER_Error* error = TRITONBACKEND_ModelConfig(model, 1, &message)) return error;
  const char* text = nullptr;
  std::size_t num_bytes = 0;
  TRITONSERVER_Error* error = TRITONSERVER_MessageSerializeToJson(message, &text, &num_bytes);
  try {
    if (error == nullptr) config_json.assign(text, num_bytes);
  } catch (...) {
    succeeded(TRITONSERVER_MessageDelete(message));
    throw;
  }
  succeeded(TRITONSERVER_MessageDelete(message));
  return error;
}

TRITONSERVER_Error* make_batcher(TRITONBACKEND_Batcher** batcher, TRITONBACKEND_Model* model) {
  if (TRITONSERVER_Error* error = check_api_version()) return error;
  TRITONBACKEND_ArtifactType kind = TRITONBACKEND_ARTIFACT_FILESYSTEM;
  const char* folder = nullptr;
  if (TRITONSERVER_Error* error = TRITONBACKEND_ModelRepository(model, &kind, &folder)) return error;
  std::string config_json;
  if (TRITONSERVER_Error* error = read_config(model, config_json)) return error;
  const Settings settings = parse_settings(config_json, folder == nullptr ? "." : folder);
  *batcher = reinterpret_cast<TRITONBACKEND_Batcher*>(new Batcher(settings));
  if (!settings.warning.empty()) log_line(TRITONSERVER_LOG_WARN, settings.warning.c_str());
  return nullptr;
}

// Nothing is thrown into the server.
TRITONSERVER_Error* initialize(TRITONBACKEND_Batcher** batcher, TRITONBACKEND_Model* model) noexcept {
  *batcher = nullptr;
  try {
    return make_batcher(batcher, model);
  } catch (const ConfigError& error) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INVALID_ARG, error.what());
  } catch (const std::exception& error) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, error.what());
  } catch (...) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, "WISP batching strategy: unknown exception");
  }
}

}  // namespace
}  // namespace wisp

#define WISP_ENTRY_POINT extern "C" __attribute__((visibility("default"))) TRITONSERVER_Error*

WISP_ENTRY_POINT TRITONBACKEND_ModelBatcherInitialize(TRITONBACKEND_Batcher** batcher, TRITONBACKEND_Model* model) {
  return wisp::initialize(batcher, model);
}

// The server calls this with null when initialization has failed.
WISP_ENTRY_POINT TRITONBACKEND_ModelBatcherFinalize(TRITONBACKEND_Batcher* batcher) {
  delete reinterpret_cast<wisp::Batcher*>(batcher);
  return nullptr;
}

WISP_ENTRY_POINT TRITONBACKEND_ModelBatchInitialize(const TRITONBACKEND_Batcher* batcher, void** userp) {
  // Read-only is the handle for the server; the object behind it is ours. Null: the server is ending the model.
  auto* own = reinterpret_cast<wisp::Batcher*>(const_cast<TRITONBACKEND_Batcher*>(batcher));
  *userp = own == nullptr ? nullptr : own->begin_batch();
  return nullptr;
}

WISP_ENTRY_POINT TRITONBACKEND_ModelBatchIncludeRequest(TRITONBACKEND_Request* request, void* userp,
                                                        bool* should_include) {
  // Without a batch of ours the server's own limits hold.
  *should_include = userp == nullptr || wisp::Batcher::include(*static_cast<wisp::BatchState*>(userp), request);
  return nullptr;
}

WISP_ENTRY_POINT TRITONBACKEND_ModelBatchFinalize(void* userp) {
  if (userp != nullptr) wisp::Batcher::finish_batch(*static_cast<wisp::BatchState*>(userp));
  return nullptr;
}
