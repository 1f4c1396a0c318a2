// Predictions of profiles, for the comparison with Python. Each line of standard input is one job:
//     PROFILE_PATH  num_cached num_new num_choices  [num_cached num_new num_choices ...]
// and is answered by a line: the predicted seconds of a pass with these requests, and the margin.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "cost_model.h"
#include "profile.h"
#include "text.h"

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string path;
    words >> path;
    std::ifstream file(path);
    try {
      const wisp::CostModel costs = wisp::parse_profile({std::istreambuf_iterator<char>(file), {}});
      wisp::Features features = wisp::kEmptyPass;
      wisp::RequestSize size;
      while (words >> size.num_cached >> size.num_new >> size.num_choices) wisp::add(features, item_features(size));
      std::printf("%.17g %.17g\n", costs.predict_s(features), costs.margin);
    } catch (const wisp::ConfigError& error) {
      std::printf("error: %s\n", error.what());
    }
  }
  return 0;
}
