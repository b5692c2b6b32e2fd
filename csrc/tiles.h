// Element-wise work on one tile of similarities, vectorised, compiled once for each instruction set.
//
// Legend
//   S     tile of cosines s_ij = z_i.z_j, `rows` x `cols`, rows `cols` apart      i  its rows, j  its columns
//   Every array that a tile's columns index is `cols` long, and `cols` a multiple of kColumnAlign: no tails.
//   Pairs that do not count hold a cosine so low that its exponential is 0 (Problem::masked).
#pragma once

#include <cstdint>

namespace dogo {

constexpr int64_t kColumnAlign = 16;   // float32 lanes of the widest registers there are
constexpr int64_t kLargestTile = 128;  // side of a tile

// What a softmax over a row makes of a cosine: exp(scale s - offset).  Offsets are null where none is needed.
template <typename T>
struct Exponent {
  T scale;               // 1 / tau
  const T* row_offsets;  // [rows], or null
  const T* col_offsets;  // [cols], or null; unused where only rows are normalised
};

// Rows of P_a and P_b, P = exp(scale s - offset) / sum, and where their KLs gather.
template <typename T>
struct Distill {
  T scale;                   // 1 / tau
  const T* offsets[2];       // [rows] a peer, or null
  const T* inverse_sums[2];  // [rows] a peer
  const T* log_ratios;       // [rows], the log of P_b / P_a at equal cosines
  double* values[2];         // [rows], sum_j KL(P_b || P_a) and the other way round are added here
};

template <typename T>
struct TileKernels {
  // row_max[i] = max(row_max[i], s_ij), and the same for columns unless col_max is null.
  void (*maxima)(const T* S, int64_t rows, int64_t cols, T* row_max, T* col_max);

  // Adds the sums of exponentials to row_sums and, unless col_sums is null, those of columns to col_sums.
  void (*exponential_sums)(
      const T* S, int64_t rows, int64_t cols, const Exponent<T>& exponent, double* row_sums, double* col_sums);

  // Q = P_a - P_b, and both KLs of each row.
  void (*distill)(const T* S_a, const T* S_b, int64_t rows, int64_t cols, const Distill<T>& distill, T* Q);

  // S becomes W = e_i row_weights[i] + e_j col_weights[j] + factor Q, with e_i, e_j by the offsets of rows and columns.
  // Q may be null; so may row_weights, which leaves factor Q alone.
  void (*weights)(
      T* S, int64_t rows, int64_t cols, const Exponent<T>& exponent, const T* row_weights, const T* col_weights,
      const T* Q, T factor);
};

// The kernels for the instructions that this machine has and ATen was told to use (ATEN_CPU_CAPABILITY).
template <typename T>
const TileKernels<T>& tile_kernels();

}  // namespace dogo
