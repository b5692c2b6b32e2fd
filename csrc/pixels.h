// Work on the pixels of one view, on bytes, compiled once for each instruction set.
//
// Legend
//   S  side of a view     P  its pitch: S rounded up to kPixelAlign; what stands in columns past S has no meaning
//   plane    [P][P] bytes of one channel, rows first         planes  the three of a view, one after another
//   band     kBand rows of a source, columns first: what works along columns is contiguous there
//
// Nearly every loop runs over whole vectors (P and kBand are multiples of them), and along rows alone: what works
// across columns is transposed before.  Numbers are whole or rounded once as Pillow does, so that results are Pillow's,
// and equal to the bit for all instruction sets; no product may be contracted with a sum (setup.py).
#pragma once

#include <cstdint>

namespace dogo {

constexpr int64_t kPixelAlign = 32;
constexpr int64_t kBand = 32;
constexpr int64_t kMostLanes = 16;   // pixels that are worked on at once
constexpr int64_t kWeightBits = 22;  // of the weights of a resize, after the point
constexpr int64_t kBoxBits = 24;     // of those of a box

// One pass of an extended box blur: 2 radius + 1 pixels weigh `inside`, one more on either side `edge`.
struct Box {
  int64_t radius;
  uint32_t inside, edge;
};

struct PixelKernels {
  // `rows` (at most kBand) of `bytes` bytes, `pitch` apart, become a band [bytes, rounded up to 64][kBand].
  void (*band)(const uint8_t* rows_first, int64_t pitch, int64_t rows, int64_t bytes, uint8_t* columns_first);

  // A band [columns][3][kBand] becomes kBand rows of each of three planes.
  void (*unband)(const uint8_t* columns_first, int64_t columns, uint8_t* planes, int64_t pitch, int64_t plane);

  // out = the weighted sum of `count` rows of n bytes, `pitch` apart.
  void (*weigh)(const uint8_t* rows, int64_t pitch, const int32_t* weights, int64_t count, int64_t n, uint8_t* out);

  void (*transpose)(const uint8_t* plane, int64_t P, uint8_t* transposed);

  // Three passes along columns of S rows; rows outside are the outermost ones.  `scratch`: 2 kMostLanes S.
  void (*blur)(const uint8_t* plane, int64_t S, int64_t P, const Box& box, int32_t* scratch, uint8_t* out);

  // Each of n bytes v becomes low + factor (v - low), clipped and truncated.
  void (*blend)(uint8_t* v, int64_t n, float low, float factor);

  // The sum of S x S pixels' luminance.
  int64_t (*luminance)(const uint8_t* planes, int64_t S, int64_t P);

  // Blends each pixel with its luminance; factor 0 makes it grey.
  void (*saturate)(uint8_t* planes, int64_t plane, float factor);

  // Turns the hue by `turn` of 256 steps.
  void (*hue)(uint8_t* planes, int64_t plane, int32_t turn);

  // Each of n bytes v from 128 on becomes 255 - v.
  void (*solarize)(uint8_t* v, int64_t n);

  // out [S][S][3] = scale[c] v + shift[c].
  void (*normalize)(const uint8_t* planes, int64_t S, int64_t P, const float* scale, const float* shift, float* out);
};

// The kernels for the instructions that this machine has and ATen was told to use (ATEN_CPU_CAPABILITY).
const PixelKernels& pixel_kernels();

}  // namespace dogo
