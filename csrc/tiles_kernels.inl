// The kernels of tiles.h, in ATen's vector type; included by tiles_<instruction set>.cpp, each with its own registers.
#include <ATen/cpu/vec/vec.h>

#include "tiles.h"

namespace dogo {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
T total(const Vec<T>& v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  T sum = 0;
  for (const T lane : lanes) sum += lane;
  return sum;
}

template <typename T>
T largest(const Vec<T>& v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  T found = lanes[0];
  for (const T lane : lanes) found = lane > found || lane != lane ? lane : found;  // NaN stays
  return found;
}

template <typename T>
void maxima(const T* S, int64_t rows, int64_t cols, T* row_max, T* col_max) {
  for (int64_t i = 0; i < rows; ++i, S += cols) {
    Vec<T> high(row_max[i]);
    for (int64_t j = 0; j < cols; j += Vec<T>::size()) {
      const auto s = Vec<T>::loadu(S + j);
      high = at::vec::maximum(high, s);
      if (col_max) at::vec::maximum(Vec<T>::loadu(col_max + j), s).store(col_max + j);
    }
    row_max[i] = largest(high);
  }
}

template <typename T, bool kOffsets, bool kColumns>
void exponential_sums(
    const T* S, int64_t rows, int64_t cols, const Exponent<T>& exponent, double* row_sums, double* col_sums) {
  const Vec<T> scale(exponent.scale);
  // Columns are summed in T over the rows of one tile, and in double from there on.
  T col_part[kColumns ? kLargestTile : 1];
  if constexpr (kColumns) {
    for (int64_t j = 0; j < cols; ++j) col_part[j] = 0;
  }
  for (int64_t i = 0; i < rows; ++i, S += cols) {
    Vec<T> sum(0);
    for (int64_t j = 0; j < cols; j += Vec<T>::size()) {
      const auto logit = Vec<T>::loadu(S + j) * scale;
      const auto e = kOffsets ? (logit - Vec<T>(exponent.row_offsets[i])).exp() : logit.exp();
      sum = sum + e;
      if constexpr (kColumns) {
        const auto e_col = kOffsets ? (logit - Vec<T>::loadu(exponent.col_offsets + j)).exp() : e;
        (Vec<T>::loadu(col_part + j) + e_col).store(col_part + j);
      }
    }
    row_sums[i] += total(sum);
  }
  if constexpr (kColumns) {
    for (int64_t j = 0; j < cols; ++j) col_sums[j] += col_part[j];
  }
}

template <typename T>
void choose_exponential_sums(
    const T* S, int64_t rows, int64_t cols, const Exponent<T>& exponent, double* row_sums, double* col_sums) {
  const auto kernel = exponent.row_offsets
                          ? (col_sums ? exponential_sums<T, true, true> : exponential_sums<T, true, false>)
                          : (col_sums ? exponential_sums<T, false, true> : exponential_sums<T, false, false>);
  kernel(S, rows, cols, exponent, row_sums, col_sums);
}

template <typename T, bool kOffsets>
void distill(const T* S_a, const T* S_b, int64_t rows, int64_t cols, const Distill<T>& row, T* Q) {
  const Vec<T> scale(row.scale);
  for (int64_t i = 0; i < rows; ++i, S_a += cols, S_b += cols, Q += cols) {
    const Vec<T> inverse_a(row.inverse_sums[0][i]), inverse_b(row.inverse_sums[1][i]), ratio(row.log_ratios[i]);
    Vec<T> value_a(0), value_b(0);
    for (int64_t j = 0; j < cols; j += Vec<T>::size()) {
      const auto s_a = Vec<T>::loadu(S_a + j), s_b = Vec<T>::loadu(S_b + j);
      auto logit_a = s_a * scale, logit_b = s_b * scale;
      if constexpr (kOffsets) {
        logit_a = logit_a - Vec<T>(row.offsets[0][i]);
        logit_b = logit_b - Vec<T>(row.offsets[1][i]);
      }
      const auto p_a = logit_a.exp() * inverse_a, p_b = logit_b.exp() * inverse_b;
      const auto log_ratio = at::vec::fmadd(s_b - s_a, scale, ratio);
      // sum_j (P_b - P_a) is 0, but not in finite precision: taken in here, it cancels the error of the sums to first
      // order (and no term is negative but by rounding).
      const auto difference = p_a - p_b;
      value_a = value_a + at::vec::fmadd(p_b, log_ratio, difference);
      value_b = value_b - at::vec::fmadd(p_a, log_ratio, difference);
      difference.store(Q + j);
    }
    row.values[0][i] += total(value_a);
    row.values[1][i] += total(value_b);
  }
}

template <typename T>
void choose_distill(const T* S_a, const T* S_b, int64_t rows, int64_t cols, const Distill<T>& row, T* Q) {
  (row.offsets[0] ? distill<T, true> : distill<T, false>)(S_a, S_b, rows, cols, row, Q);
}

template <typename T, bool kOffsets, bool kDistill>
void weights(
    T* S, int64_t rows, int64_t cols, const Exponent<T>& exponent, const T* row_weights, const T* col_weights,
    const T* Q, T factor) {
  const Vec<T> scale(exponent.scale), share(factor);
  for (int64_t i = 0; i < rows; ++i, S += cols) {
    const Vec<T> row_weight(row_weights[i]);
    for (int64_t j = 0; j < cols; j += Vec<T>::size()) {
      const auto logit = Vec<T>::loadu(S + j) * scale;
      const auto col_weight = Vec<T>::loadu(col_weights + j);
      Vec<T> W;
      if constexpr (kOffsets) {
        const auto e_row = (logit - Vec<T>(exponent.row_offsets[i])).exp();
        const auto e_col = (logit - Vec<T>::loadu(exponent.col_offsets + j)).exp();
        W = at::vec::fmadd(e_row, row_weight, e_col * col_weight);
      } else {
        W = logit.exp() * (row_weight + col_weight);
      }
      if constexpr (kDistill) W = at::vec::fmadd(Vec<T>::loadu(Q + i * cols + j), share, W);
      W.store(S + j);
    }
  }
}

template <typename T>
void choose_weights(
    T* S, int64_t rows, int64_t cols, const Exponent<T>& exponent, const T* row_weights, const T* col_weights,
    const T* Q, T factor) {
  if (!row_weights) {
    for (int64_t k = 0; k < rows * cols; k += Vec<T>::size()) (Vec<T>::loadu(Q + k) * Vec<T>(factor)).store(S + k);
    return;
  }
  const auto kernel = exponent.row_offsets ? (Q ? weights<T, true, true> : weights<T, true, false>)
                                           : (Q ? weights<T, false, true> : weights<T, false, false>);
  kernel(S, rows, cols, exponent, row_weights, col_weights, Q, factor);
}

template <typename T>
constexpr TileKernels<T> kKernels{maxima<T>, choose_exponential_sums<T>, choose_distill<T>, choose_weights<T>};

}  // namespace
}  // namespace dogo
