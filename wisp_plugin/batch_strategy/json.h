// picojson with integers told from other numbers, and a parser that wants the whole text.
#pragma once

#ifndef PICOJSON_USE_INT64
#define PICOJSON_USE_INT64
#endif
#include <string>

#include "picojson.h"
#include "text.h"

namespace wisp {

// The one JSON value in `text`. Raises ConfigError.
inline picojson::value parse_json(const std::string& text) {
  picojson::value value;
  std::string error;
  auto position = text.begin();
  try {
    position = picojson::parse(value, text.begin(), text.end(), &error);
  } catch (const std::overflow_error&) {
    throw ConfigError("a number is out of range");
  }
  if (!error.empty()) throw ConfigError("it is not JSON");
  if (text.find_first_not_of(" \t\r\n", static_cast<std::size_t>(position - text.begin())) != std::string::npos) {
    throw ConfigError("it is not JSON: something stands behind its end");
  }
  return value;
}

}  // namespace wisp
