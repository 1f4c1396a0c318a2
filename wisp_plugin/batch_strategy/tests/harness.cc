// All checks of the strategy against fakes of the server's symbols.
//     harness [--fuzz NUM_REQUESTS]
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "check.h"

int main(int argc, char** argv) {
  const bool has_fuzz = argc == 3 && std::string(argv[1]) == "--fuzz";
  const int num_requests = has_fuzz ? std::atoi(argv[2]) : 100'000;
  const std::string folder =
      (std::filesystem::temp_directory_path() / ("wisp_harness_" + std::to_string(getpid()))).string();
  std::filesystem::create_directory(folder);
  check_config();
  check_costs();
  check_profile(folder);
  check_requests();
  check_decisions();
  check_first_seen();
  check_server_calls();
  check_simulation(std::min(400, num_requests / 250));
  check_growth(folder);
  check_fuzz(num_requests);
  std::filesystem::remove_all(folder);
  CHECK(fakes::num_live_errors() == 0);
  std::printf("all checks passed; %d random requests\n", num_requests);
  return 0;
}
