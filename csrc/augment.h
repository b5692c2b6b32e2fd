// Augmented views of decoded images: the pixels that Pillow makes, normalised.
//
// A view is a crop, resized (triangle filter, wider where it shrinks), flipped, its colours jittered, made grey,
// blurred and solarised; kernels/augment.py says what each parameter is.  Views are made side by side on ATen's
// threads, each by one of them: equal to the bit for any number.
//
// What a 224 px view takes, of a crop of 260 x 260 px (the mean of SimCLR's policy on photos of 320 px): 0.2 MB read
// and 0.6 MB written, 0.08 ms at 10 GB/s; and operations on one number each, in millions: resize 3, brightness and
// contrast 3, saturation 1, hue 5, blur 10, the last 0.5.  With 16 numbers in a register, two instructions a cycle
// and 3.5 GHz that is 0.13 ms with each as often as the policy wants it.  Measured: 0.33 ms, and 0.05 more where memory
// is new (400 views, one core of a Xeon, Sapphire Rapids; Pillow: 2.5).  Stores past the caches make that 0.29, and
// 0.44 in new memory, which the system has just filled with zeros.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

namespace dogo {

struct SourceImage {
  const uint8_t* pixels;  // [height][width][3]
  int64_t height, width;
};

struct View {
  int64_t source;
  int64_t left, top, width, height;  // the crop, in source pixels
  bool flip, jitter, grayscale, solarize;
  std::array<double, 4> factors;  // brightness, contrast, saturation, hue
  std::array<int64_t, 4> order;   // of the four
  double sigma;                   // of the blur in view pixels, 0 without
};

struct Statistics {
  std::array<double, 3> mean, std;  // of values in [0, 1]
};

constexpr double kLargestSigma = 1e4;  // wider boxes would not fit the bits of their sums

// out: [m, 3, S, S] in float32, channels last.
void augment_views(
    const std::vector<SourceImage>& images, const std::vector<View>& views, const Statistics& statistics,
    const at::Tensor& out);

}  // namespace dogo
