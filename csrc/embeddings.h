// Rows before the tiles and after: unit vectors, their blocks, and gradients of raw embeddings.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "buffer.h"
#include "schedule.h"

namespace dogo {

// Unit rows [2, n, D] of x and y [n, D], float32 or float64, and 1 / |row|, float64 [2, n].  By the largest entry
// first, since squares overflow; a row of zeros stays zero, a row that is not finite becomes NaN.
std::tuple<at::Tensor, at::Tensor> normalize(const at::Tensor& x, const at::Tensor& y);

// Rows in blocks, as tiles multiply them: `rows` [side, D] and `columns` [D, side] of each, zeros behind the last
// image.
template <typename T>
struct Packed {
  int64_t side, D;
  Buffer<T> rows, columns;

  // z: [2, N, D]
  Packed(const at::Tensor& z, const std::vector<Block>& blocks, int64_t side);
  const T* block(int64_t b) const { return rows.data() + b * side * D; }
  const T* transposed(int64_t b) const { return columns.data() + b * side * D; }
};

// Gradients of unit rows as tiles add to them, own blocks alone: for rows of tiles [side, D], for columns [D, side].
template <typename T>
struct Gradients {
  int64_t side, D;
  std::vector<int32_t> place;  // of a block among the own ones, -1 where it is another rank's
  Buffer<T> rows, columns;

  Gradients(int64_t D, const std::vector<Block>& blocks, int64_t side);
  T* block(int64_t b) { return rows.data() + place[b] * side * D; }
  T* transposed(int64_t b) { return columns.data() + place[b] * side * D; }

  // [2, n, D]: (g_i - (g_i.z_i) z_i) / |x_i|, the gradient of raw embeddings.
  at::Tensor project(
      const Packed<T>& z, const std::vector<Block>& blocks, const at::Tensor& inverse_norm, int64_t first_image) const;
};

}  // namespace dogo
