// What one call of a loss asks for, in the numbers that the sweeps take; see the legend of loss.cpp.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "schedule.h"

namespace dogo {

// Of softmaxes over a row: NT-Xent of rows of either view, KL of rows of view 1.
enum Kind { kView1, kView2, kDistill, kKinds };

struct Settings {
  int64_t n;  // images of this rank
  int64_t world = 1, rank = 0;
  std::optional<double> tau_contrast;  // NT-Xent, where given
  std::optional<double> tau_distill;   // KL between two peers, where given
  std::vector<double> weights;         // of the KL in either peer's gradient
  bool mean = false;                   // the KL over all N^2 entries, not over rows
};

struct Problem {
  int64_t n, N, first_image;  // first_image: this rank's, among those of all ranks
  int64_t world, rank;
  int64_t side;  // of a tile
  std::vector<Block> blocks;
  bool contrast, distill;
  std::array<double, kKinds> inverse_tau;
  std::array<bool, kKinds> offsets;  // whether exponentials need one
  double contrast_factor;            // W / (M tau_c)
  std::array<double, 2> kl_factor;   // of P_own - P_other in W_ij, a peer
  double kl_share;                   // of a row's KL in the value
  double masked;                     // a cosine whose exponential is 0 at either temperature with any offset

  // `largest_logit`: beyond it, exponentials need an offset.
  Problem(const Settings& settings, double largest_logit);

  int32_t count() const { return static_cast<int32_t>(blocks.size()); }
  Kind kind_of(int64_t block) const { return blocks[block].view == 0 ? kView1 : kView2; }
  bool distills(const Task& task) const { return distill && blocks[task.I].view != blocks[task.J].view; }
  bool same_images(const Task& task) const { return blocks[task.I].first_image == blocks[task.J].first_image; }
};

}  // namespace dogo
