// The profile file of wisp_plugin/profile.py, schema 1: read, checked as there, and watched for changes.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "cost_model.h"

namespace wisp {

// The costs and the margin in the text of a profile. Raises ConfigError with a few words on the first thing wrong.
CostModel parse_profile(const std::string& text);

// What tells one content of a file from another without reading it.
struct FileStamp {
  std::int64_t modified_ns = 0;
  std::int64_t num_bytes = 0;
  ino_t inode = 0;
  bool is_regular = false;  // else a folder, a FIFO, a device

  bool operator==(const FileStamp& other) const noexcept {
    return modified_ns == other.modified_ns && num_bytes == other.num_bytes && inode == other.inode &&
           is_regular == other.is_regular;
  }
};

// Costs for the batches to come. Batches take a copy, so a new profile changes none that has begun.
class CostSource {
 public:
  // Fixed costs.
  explicit CostSource(const CostModel& costs) : costs_(costs) {}

  // Costs of a profile, with `margin` instead of its own if given. Raises ConfigError if it cannot be used.
  CostSource(std::string profile_path, std::optional<double> margin);

  CostModel costs() const noexcept;

  // Looks at the file if the last look is `kLookEvery_ms` old and reads it if it has changed. A file that cannot be
  // used costs one log line and leaves the old costs. `now_ms`: steady clock. Any thread, never waits for another.
  void refresh(std::int64_t now_ms) noexcept;

  static constexpr std::int64_t kLookEvery_ms = 1000;

 private:
  void look() noexcept;
  CostModel load() const;

  std::string path_;  // empty: nothing to watch
  std::optional<double> margin_;
  std::atomic<std::int64_t> next_look_ms_{0};
  std::mutex looking_;              // held by the one thread that looks; others go on
  std::optional<FileStamp> stamp_;  // of the last look, usable or not; nothing if the file was not there
  mutable std::mutex copying_;      // held for a copy only
  CostModel costs_;
};

}  // namespace wisp
