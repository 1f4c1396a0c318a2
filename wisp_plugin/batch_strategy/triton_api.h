// The part of Triton's backend API that a batching strategy needs.
//
// With WISP_TRITON_HEADERS (make TRITON_INCLUDE_DIR=..., CMake option of the same name) the official headers declare
// it. Without them the declarations below do: the interface is C, its names, types and enum values are fixed by the
// API version that `check_api_version` asks for, and the symbols resolve in the server when it loads the library.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef WISP_TRITON_HEADERS

#include "triton/core/tritonbackend.h"
#include "triton/core/tritonserver.h"

#else

extern "C" {

struct TRITONSERVER_Error;
struct TRITONSERVER_Message;
struct TRITONBACKEND_Batcher;
struct TRITONBACKEND_Input;
struct TRITONBACKEND_Model;
struct TRITONBACKEND_Request;

// Official: TRITONSERVER_*_enum, unscoped C enums that start at 0.
enum TRITONSERVER_Error_Code { TRITONSERVER_ERROR_INTERNAL = 1, TRITONSERVER_ERROR_INVALID_ARG = 3,
                               TRITONSERVER_ERROR_UNSUPPORTED = 5, TRITONSERVER_ERROR_CANCELLED = 7 };
enum TRITONSERVER_LogLevel { TRITONSERVER_LOG_INFO = 0, TRITONSERVER_LOG_WARN = 1, TRITONSERVER_LOG_VERBOSE = 3 };
enum TRITONSERVER_DataType { TRITONSERVER_TYPE_INVALID = 0, TRITONSERVER_TYPE_INT32 = 8, TRITONSERVER_TYPE_INT64 = 9,
                             TRITONSERVER_TYPE_BF16 = 14 };
enum TRITONSERVER_MemoryType { TRITONSERVER_MEMORY_CPU = 0, TRITONSERVER_MEMORY_CPU_PINNED = 1,
                               TRITONSERVER_MEMORY_GPU = 2 };
enum TRITONSERVER_ParameterType { TRITONSERVER_PARAMETER_STRING = 0, TRITONSERVER_PARAMETER_INT = 1,
                                  TRITONSERVER_PARAMETER_BOOL = 2, TRITONSERVER_PARAMETER_DOUBLE = 3,
                                  TRITONSERVER_PARAMETER_BYTES = 4 };
enum TRITONBACKEND_ArtifactType { TRITONBACKEND_ARTIFACT_FILESYSTEM = 0 };

TRITONSERVER_Error* TRITONSERVER_ErrorNew(TRITONSERVER_Error_Code code, const char* message);
void TRITONSERVER_ErrorDelete(TRITONSERVER_Error* error);
const char* TRITONSERVER_ErrorMessage(TRITONSERVER_Error* error);
TRITONSERVER_Error* TRITONSERVER_LogMessage(TRITONSERVER_LogLevel level, const char* file, const int line,
                                            const char* message);
TRITONSERVER_Error* TRITONSERVER_MessageSerializeToJson(TRITONSERVER_Message* message, const char** base,
                                                        std::size_t* byte_size);
TRITONSERVER_Error* TRITONSERVER_MessageDelete(TRITONSERVER_Message* message);

TRITONSERVER_Error* TRITONBACKEND_ApiVersion(std::uint32_t* major, std::uint32_t* minor);
TRITONSERVER_Error* TRITONBACKEND_ModelConfig(TRITONBACKEND_Model* model, const std::uint32_t config_version,
                                              TRITONSERVER_Message** config);
TRITONSERVER_Error* TRITONBACKEND_ModelRepository(TRITONBACKEND_Model* model, TRITONBACKEND_ArtifactType* kind,
                                                  const char** location);
TRITONSERVER_Error* TRITONBACKEND_RequestInputCount(TRITONBACKEND_Request* request, std::uint32_t* count);
TRITONSERVER_Error* TRITONBACKEND_RequestInputByIndex(TRITONBACKEND_Request* request, const std::uint32_t index,
                                                      TRITONBACKEND_Input** input);
TRITONSERVER_Error* TRITONBACKEND_InputProperties(TRITONBACKEND_Input* input, const char** name,
                                                  TRITONSERVER_DataType* datatype, const std::int64_t** shape,
                                                  std::uint32_t* dims_count, std::uint64_t* byte_size,
                                                  std::uint32_t* buffer_count);
TRITONSERVER_Error* TRITONBACKEND_InputBuffer(TRITONBACKEND_Input* input, const std::uint32_t index,
                                              const void** buffer, std::uint64_t* byte_size,
                                              TRITONSERVER_MemoryType* memory_type, std::int64_t* memory_type_id);
TRITONSERVER_Error* TRITONBACKEND_RequestParameterCount(TRITONBACKEND_Request* request, std::uint32_t* count);
TRITONSERVER_Error* TRITONBACKEND_RequestParameter(TRITONBACKEND_Request* request, const std::uint32_t index,
                                                   const char** key, TRITONSERVER_ParameterType* type,
                                                   const void** value);
TRITONSERVER_Error* TRITONBACKEND_InferenceRequestTimeoutMicroseconds(TRITONBACKEND_Request* request,
                                                                      std::uint64_t* timeout_us);

// What this library provides (entry_points.cc).
TRITONSERVER_Error* TRITONBACKEND_ModelBatcherInitialize(TRITONBACKEND_Batcher** batcher, TRITONBACKEND_Model* model);
TRITONSERVER_Error* TRITONBACKEND_ModelBatcherFinalize(TRITONBACKEND_Batcher* batcher);
TRITONSERVER_Error* TRITONBACKEND_ModelBatchInitialize(const TRITONBACKEND_Batcher* batcher, void** userp);
TRITONSERVER_Error* TRITONBACKEND_ModelBatchIncludeRequest(TRITONBACKEND_Request* request, void* userp,
                                                           bool* should_include);
TRITONSERVER_Error* TRITONBACKEND_ModelBatchFinalize(void* userp);

}  // extern "C"

#endif  // WISP_TRITON_HEADERS

namespace wisp {

// Of the backend API: request parameters came with 1.12, batching strategies with 1.11, request timeouts with 1.17.
inline constexpr std::uint32_t kApiMajor = 1;
inline constexpr std::uint32_t kApiMinor = 17;

// True if a call succeeded. An error's text is of no use here: what is not there counts as not given.
inline bool succeeded(TRITONSERVER_Error* error) noexcept {
  if (error == nullptr) return true;
  TRITONSERVER_ErrorDelete(error);
  return false;
}

inline void log_line(TRITONSERVER_LogLevel level, const char* message) noexcept {
  succeeded(TRITONSERVER_LogMessage(level, "batchstrategy.so", 0, message));
}

}  // namespace wisp
