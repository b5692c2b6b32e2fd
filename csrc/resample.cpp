#include "resample.h"

#include <algorithm>
#include <cmath>

namespace dogo {

void Taps::set(int64_t length, int64_t size) {
  const double step = static_cast<double>(length) / static_cast<double>(size), reach = std::max(step, 1.0);
  stride_ = static_cast<int64_t>(std::ceil(reach)) * 2 + 1;
  first_.resize(size);
  count_.resize(size);
  weights_.resize(size * stride_);
  exact_.resize(stride_);
  for (int64_t i = 0; i < size; ++i) {
    const double center = (static_cast<double>(i) + 0.5) * step;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - reach + 0.5), 0);
    const int64_t count = std::min(static_cast<int64_t>(center + reach + 0.5), length) - first;
    double total = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double distance = (static_cast<double>(first + k) - center + 0.5) * (1.0 / reach);
      exact_[k] = std::max(1.0 - std::abs(distance), 0.0);
      total += exact_[k];
    }
    for (int64_t k = 0; k < count; ++k) {
      weights_[i * stride_ + k] = static_cast<int32_t>(exact_[k] / total * (1 << kWeightBits) + 0.5);
    }
    first_[i] = first;
    count_[i] = count;
  }
}

Box box_of(double sigma) {
  // In float, as Pillow does: the weights' last bits are those of its own.
  const float variance = static_cast<float>(sigma) * static_cast<float>(sigma) / kBlurPasses;
  const float length = static_cast<float>(std::sqrt(12.0 * variance + 1.0));
  const float whole = static_cast<float>(std::floor((length - 1.0) / 2.0));
  const float rest =
      (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)));
  const float radius = whole + rest;
  const int64_t inner = static_cast<int64_t>(radius);
  const auto inside = static_cast<uint32_t>((1 << kBoxBits) / (2 * radius + 1));
  return {inner, inside, ((1u << kBoxBits) - static_cast<uint32_t>(2 * inner + 1) * inside) / 2};
}

}  // namespace dogo
