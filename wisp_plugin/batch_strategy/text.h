// Numbers and messages. Numbers are read without the locale and without allocating.
#pragma once

#include <charconv>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace wisp {

// Wrong configuration or a malformed profile; the message is one line.
struct ConfigError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The whole of `text` as a finite decimal number.
inline std::optional<double> parse_number(std::string_view text) noexcept {
  double value = 0.0;
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, value);
  if (result.ec != std::errc() || result.ptr != end || !std::isfinite(value)) return std::nullopt;
  return value;
}

// `text` in double quotes, on one line and not too long.
inline std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text.substr(0, 200)) result += static_cast<unsigned char>(c) < ' ' ? '?' : c;
  return result + (text.size() > 200 ? "...\"" : "\"");
}

}  // namespace wisp
