// Between the sweeps: row sums of exponentials become losses, and what turns an exponential into a weight of sweep 2.
#pragma once

#include <ATen/core/Tensor.h>

#include "buffer.h"
#include "problem.h"

namespace dogo {

// One row's softmax: others than its positive (`log_rest`, ln of their sum), and what the positive's logit adds.
struct Softmax {
  double log_sum = 0, left = 0, loss = 0;  // ln l_i, 1 - P(positive), -ln P(positive)

  Softmax() = default;
  Softmax(double log_rest, double positive);
};

// One peer's rows in the order of blocks, `side` for each block; `softmax` by kind and image, [3 N].
template <typename T>
struct Rows {
  Buffer<T> contrast_offset, distill_offset;  // empty where none are needed
  Buffer<T> contrast, distill;                // what turns exp(s / tau - offset) into W_ij's share, into P
  Buffer<T> positive;                         // W_ij of the positive, for rows of view 1
  Buffer<Softmax> softmax;

  // `maxima`: [3, N] of this peer.
  void take_maxima(const Problem& problem, const double* maxima);

  // `sums`: [3, N] of this peer; z: its unit rows [2, N, D].  Returns NT-Xent of the global batch.
  double take_sums(const Problem& problem, const double* sums, const at::Tensor& z);

  // W_ij of the positives; `factor` is that of P_own - P_other, `other` the other peer's rows where there is a KL.
  void weigh_positives(const Problem& problem, double factor, const Rows* other);
};

// The positives' part of KL(P_other || P_own) over this rank's rows, P_own - P_other added as in tiles.h.
template <typename T>
double positives_kl(const Problem& problem, const Rows<T>& own, const Rows<T>& other);

// ln of P_b / P_a at equal cosines, a row each in the order of blocks.
template <typename T>
Buffer<T> log_ratios(const Problem& problem, const Rows<T>& a, const Rows<T>& b);

}  // namespace dogo
