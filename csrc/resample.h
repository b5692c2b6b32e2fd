// What a resize and a blur weigh pixels with.
#pragma once

#include <cstdint>
#include <vector>

#include "pixels.h"

namespace dogo {

// For each of `size` pixels of an axis, which source pixels it is made of: a triangle about its centre, as wide as the
// step between centres, at least one pixel to either side; nothing outside the `length` source pixels.
class Taps {
 public:
  void set(int64_t length, int64_t size);

  struct Pixel {
    int64_t first, count;
    const int32_t* weights;  // [count], of 2^kWeightBits in all
  };
  Pixel operator[](int64_t i) const { return {first_[i], count_[i], weights_.data() + i * stride_}; }

 private:
  int64_t stride_ = 0;
  std::vector<int64_t> first_, count_;
  std::vector<int32_t> weights_;
  std::vector<double> exact_;
};

constexpr int64_t kBlurPasses = 3;

// The extended box (Gwosdek et al. 2011) of which kBlurPasses have the variance sigma^2.
Box box_of(double sigma);

}  // namespace dogo
