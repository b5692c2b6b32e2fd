#include "problem.h"

#include <algorithm>

#include "tiles.h"

namespace dogo {
namespace {

// Blocks of equal size, so that all tiles have one shape.  64 images a block or 128: at D = 128 on two cores of an AMD
// EPYC (Zen 5) 0.41 and 0.53 ms at N = 128, 3.36 and 3.44 at 512, 12.3 and 12.6 at 1024, 47.6 and 48.2 at 2048 (256:
// 46.7).  Small ones keep more threads busy and take less memory.
int64_t side_of(int64_t n) {
  const int64_t most = n <= 512 ? 64 : kLargestTile;
  const int64_t blocks = (n + most - 1) / most;
  const int64_t images = (n + blocks - 1) / blocks;
  return (images + kColumnAlign - 1) / kColumnAlign * kColumnAlign;
}

}  // namespace

Problem::Problem(const Settings& settings, double largest_logit)
    : n(settings.n),
      N(settings.n * settings.world),
      first_image(settings.n * settings.rank),
      world(settings.world),
      rank(settings.rank),
      side(side_of(settings.n)),
      blocks(make_blocks(settings.n, settings.world, settings.rank, side)),
      contrast(settings.tau_contrast.has_value()),
      distill(settings.tau_distill.has_value()) {
  const double tau_c = settings.tau_contrast.value_or(settings.tau_distill.value_or(1));
  const double tau_d = settings.tau_distill.value_or(tau_c);
  const double W = static_cast<double>(world), images = static_cast<double>(N);
  inverse_tau = {1 / tau_c, 1 / tau_c, 1 / tau_d};
  for (int kind = 0; kind < kKinds; ++kind) {
    offsets[kind] = (kind == kDistill ? distill : contrast) && inverse_tau[kind] > largest_logit;
  }
  contrast_factor = W / (2 * images * tau_c);
  kl_share = settings.mean ? 1 / (images * images) : 1 / images;
  for (size_t p = 0; p < 2; ++p) {
    kl_factor[p] = distill ? settings.weights[p] * W * kl_share / tau_d : 0;
  }
  masked = -3 - 1e4 * std::max(tau_c, tau_d);
}

}  // namespace dogo
