// All checks of the strategy against fakes of the server's symbols.
//     harness [--fuzz NUM_REQUESTS] [--loads NUM_RANDOM_LOADS]
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "check.h"

int main(int argc, char** argv) {
  std::map<std::string, int> options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    const int number = i + 1 < argc ? std::atoi(argv[i + 1]) : 0;
    if ((name != "--fuzz" && name != "--loads") || number < 1) {
      std::fprintf(stderr, "harness: %s; allowed: --fuzz and --loads, each with a number above 0\n", name.c_str());
      return 2;
    }
    options[name] = number;
  }
  const int num_requests = options.count("--fuzz") ? options["--fuzz"] : 100'000;
  const int num_loads = options.count("--loads") ? options["--loads"] : std::min(400, num_requests / 250);
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
  check_simulation(num_loads);
  check_growth(folder);
  check_fuzz(num_requests);
  std::filesystem::remove_all(folder);
  CHECK(fakes::num_live_errors() == 0);
  std::printf("all checks passed; %d random requests\n", num_requests);
  return 0;
}
