#include "cost_model.h"

#include <cmath>

namespace wisp {
namespace {

// As `_power` of estimator.py, so that both round alike.
double power(double value, double exponent) noexcept {
  if (exponent == 1.0) return value;
  if (exponent == 2.0) return value * value;
  if (exponent == 4.0) return (value * value) * (value * value);
  if (exponent == 0.5) return std::sqrt(value);
  if (exponent == 0.25) return std::sqrt(std::sqrt(value));
  return std::pow(value, exponent);
}

double dot(const Features& features, const Features& prices) noexcept {
  double sum = 0.0;
  for (std::size_t i = 0; i < kNumFeatures; ++i) sum += features[i] * prices[i];
  return sum;
}

}  // namespace

Features item_features(const RequestSize& size) noexcept {
  return {0.0,
          1.0,
          size.num_new,
          size.num_choices,
          size.num_new * (size.num_cached + (size.num_new + 1.0) / 2.0),
          size.num_cached + size.num_new};
}

void add(Features& sum, const Features& item) noexcept {
  for (std::size_t i = 0; i < kNumFeatures; ++i) sum[i] += item[i];
}

double CostModel::predict_s(const Features& features) const noexcept {
  const double work = power(dot(features, memory), norm) + power(dot(features, arithmetic), norm);
  return power(work, 1.0 / norm);
}

}  // namespace wisp
