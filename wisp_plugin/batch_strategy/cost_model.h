// Predicted time of a batch: what `Estimator.predict` of wisp_plugin/estimator.py computes, in double.
#pragma once

#include <array>
#include <cstddef>

namespace wisp {

// Columns: passes, sessions, new_tokens, choices, new_x_context, context; sums over the requests of a batch.
inline constexpr std::size_t kNumFeatures = 6;
inline constexpr std::array<const char*, kNumFeatures> kFeatureNames = {
    "passes", "sessions", "new_tokens", "choices", "new_x_context", "context"};
using Features = std::array<double, kNumFeatures>;

inline constexpr Features kEmptyPass = {1.0, 0.0, 0.0, 0.0, 0.0, 0.0};
inline constexpr double kMaxNorm = 32.0;

// One request: it computes `num_new` tokens behind `num_cached` and chooses `num_choices`.
struct RequestSize {
  double num_cached = 0.0;
  double num_new = 0.0;
  double num_choices = 1.0;
};

// Column 0 is 0, because the pass counts once (kEmptyPass).
Features item_features(const RequestSize& size) noexcept;

void add(Features& sum, const Features& item) noexcept;

// The smooth maximum of two lines; prices in seconds per unit of each feature. Plain data: copied into every batch.
struct CostModel {
  Features memory = {};
  Features arithmetic = {};
  double norm = 1.0;
  double margin = 1.0;  // factor on predictions that about 5 % of passes exceed

  // Expected seconds of a pass, without the margin.
  double predict_s(const Features& features) const noexcept;
};

}  // namespace wisp
