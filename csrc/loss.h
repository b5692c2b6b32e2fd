// The losses of two peers (or of one) and their gradients, tile by tile; the maths stands in loss.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <tuple>
#include <vector>

#include "problem.h"

namespace dogo {

// One loss from unit vectors to gradients, for one thread at a time.  Between its steps ranks reduce, in place, the
// tensors that it returned.
class Loss {
 public:
  virtual ~Loss() = default;

  // Whether exponentials need an offset; if so, `maxima` comes first.
  virtual bool needs_maxima() const = 0;

  // [peers, 3, N] largest logits of rows over this rank's share of tiles, to be reduced by max: NT-Xent of view 1, of
  // view 2, KL.
  virtual at::Tensor maxima() = 0;

  // float64 [peers, 3, N] sums of exponentials over this rank's share, positives left out, to be reduced by sum.
  virtual at::Tensor sums() = 0;

  // float64 [peers, 2]: NT-Xent of the global batch, and this rank's share of the KL.  With `inverse_norms`, a peer
  // each as from `normalize`, also the gradients of raw embeddings [2, n, D] a peer, `world` times the true ones.
  virtual std::tuple<at::Tensor, std::vector<at::Tensor>> finish(const std::vector<at::Tensor>& inverse_norms) = 0;
};

// z: unit rows [2, N, D] of all ranks, a peer each, float32 or float64.
std::unique_ptr<Loss> make_loss(const std::vector<at::Tensor>& z, const Settings& settings);

}  // namespace dogo
