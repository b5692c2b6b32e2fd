// NT-Xent of two peers and the KL between their similarities, forward and backward, without a similarity matrix.
//
// Legend (also of schedule.h and tiles.h)
//   n, N  images of this rank and of all W ranks, M = 2N rows     D  embedding width     p  peer, 0 or 1
//   z_i   unit row; s_ij = z_i.z_j     c, d  NT-Xent and KL, each with its temperature tau
//   o_i   offset of a row's exponents: 0, or its largest logit where a temperature is so low that sums would overflow
//
// Every tile of pairs (I, J) is computed once for its rows and its columns, in two sweeps:
//
//   sweep 1   r_i = sum_j exp(s_ij / tau - o_i) over all j but i and its positive, for c, and for d in view 1 against 2
//   between   a_i = o_i + ln r_i - s_pos / tau     left_i = sigmoid(a_i) = 1 - P(positive)     ntxent_i = softplus(a_i)
//             ln l_i = s_pos / tau + softplus(a_i)     P_ij = exp(s_ij / tau) / l_i
//   sweep 2   W_ij = (P_ij + P_ji) W / (M tau_c) + weight (P_own - P_other)_ij W share / tau_d
//             G_I += W z_J, G_J += W^T z_I;   the KL's value, P_b (ln P_b - ln P_a) + (P_a - P_b) summed over j
//   after     dx_i = (G_i - (G_i.z_i) z_i) / |x_i|
//
// The positive's weight is -(left_i + left_pos) for c, and its P_a - P_b is left_b - left_a: small and exact in rows
// that have learned their positive, where 1 - P in float32 is noise.
//
// Work, forward and backward: 4 M^2 D FLOP a peer (plain PyTorch: 6), M^2 + N^2 exponentials a peer.  At N = 2048 and
// D = 128 that is 290 GFLOP/s on two cores of an AMD EPYC (Zen 5), whose products alone reach 460.  Memory: six times
// z, its gradients included, three tiles a thread, and 16 bytes for each task, of which there are (M / 128)^2 / 2.
#include "loss.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "embeddings.h"
#include "multiply.h"
#include "rows.h"
#include "tiles.h"

namespace dogo {
namespace {

// Without offsets a row's sum lies between exp(-1 / tau) and M exp(1 / tau).  50 keeps it, and 1 / l_i over M, normal
// in float32 (1e-38) up to M = 2^26, and takes in tau = 0.02.
template <typename T>
constexpr double kLargestLogit = sizeof(T) == 4 ? 50.000001 : 300.0;

// What one tile of one peer gives to its rows (NT-Xent, and KL) and to its columns (NT-Xent alone).
struct Part {
  std::vector<double> rows, cols, distill;
};

// What one tile of both peers goes through in sweep 2: similarities, then weights; and both KLs of its rows.
template <typename T>
struct Tile {
  Buffer<T> S[2], Q;
  std::vector<double> kl[2];
};

template <typename T>
class Sweeps final : public Loss {
 public:
  Sweeps(const std::vector<at::Tensor>& z, const Settings& settings);

  bool needs_maxima() const override { return problem_.offsets[kView1] || problem_.offsets[kDistill]; }
  at::Tensor maxima() override;
  at::Tensor sums() override;
  std::tuple<at::Tensor, std::vector<at::Tensor>> finish(const std::vector<at::Tensor>& inverse_norms) override;

 private:
  void similarities(size_t p, const Task& task, T* S) const;
  Exponent<T> exponent(size_t p, Kind kind, const Task& task) const;
  template <typename Tile, typename Merge>
  at::Tensor first_sweep(double start, const Tile& tile, const Merge& merge) const;
  void weigh(const Task& task, const Buffer<T>& ratios, bool differentiate, Tile<T>& tile) const;
  std::array<double, 2> second_sweep(std::vector<Gradients<T>>& gradients) const;

  const Problem problem_;
  const TileKernels<T>& kernels_;
  const std::vector<at::Tensor> unit_;  // z as given
  std::vector<Packed<T>> z_;
  std::vector<Task> pairs_;
  std::vector<Rows<T>> rows_;
  at::Tensor maxima_, sums_;
};

template <typename T>
Sweeps<T>::Sweeps(const std::vector<at::Tensor>& z, const Settings& settings)
    : problem_(settings, kLargestLogit<T>), kernels_(tile_kernels<T>()), unit_(z), rows_(z.size()) {
  for (const auto& unit : z) z_.emplace_back(unit, problem_.blocks, problem_.side);
  const auto blocks = problem_.count();
  const auto due = [&](const Task& task) { return problem_.contrast || problem_.distills(task); };
  pairs_ = choose(all_pairs(blocks), blocks, due);
}

// -- one tile --------------------------------------------------------------------------------------------------------

// S = z_I z_J^T; rows with themselves, positives, and columns behind the last image masked.
template <typename T>
void Sweeps<T>::similarities(size_t p, const Task& task, T* S) const {
  multiply(z_[p].block(task.I), z_[p].transposed(task.J), S, problem_.side, problem_.side, z_[p].D, false);
  const int64_t rows = problem_.blocks[task.I].images, cols = problem_.blocks[task.J].images;
  const auto masked = static_cast<T>(problem_.masked);
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(S + i * problem_.side + cols, S + (i + 1) * problem_.side, masked);
    if (problem_.same_images(task)) S[i * problem_.side + i] = masked;
  }
}

template <typename T>
Exponent<T> Sweeps<T>::exponent(size_t p, Kind kind, const Task& task) const {
  const auto& offset = kind == kDistill ? rows_[p].distill_offset : rows_[p].contrast_offset;
  const auto scale = static_cast<T>(problem_.inverse_tau[kind]);
  if (offset.empty()) return {scale, nullptr, nullptr};
  return {scale, offset.data() + task.I * problem_.side, offset.data() + task.J * problem_.side};
}

// -- sweep 1 ---------------------------------------------------------------------------------------------------------

// float64 [peers, 3, N] of `start`, into which `merge` takes what `tile(p, task, S, part)` finds in this rank's share.
template <typename T>
template <typename Tile, typename Merge>
at::Tensor Sweeps<T>::first_sweep(double start, const Tile& tile, const Merge& merge) const {
  const auto peers = static_cast<int64_t>(z_.size());
  auto result = at::full({peers, kKinds, problem_.N}, start, at::kDouble);
  auto* found = result.template mutable_data_ptr<double>();
  const auto add = [&](int64_t p, int32_t block, Kind kind, const std::vector<double>& part) {
    auto* to = found + (p * kKinds + kind) * problem_.N + problem_.blocks[block].first_image;
    for (int64_t i = 0; i < problem_.blocks[block].images; ++i) to[i] = merge(to[i], part[i]);
  };
  int64_t k = 0;  // ranks share the tiles
  const auto tasks =
      choose(pairs_, problem_.count(), [&](const Task&) { return k++ % problem_.world == problem_.rank; });
  run(tasks, problem_.count(), [&](Turns& turns) {
    return
        [&, S = Buffer<T>(problem_.side * problem_.side), parts = std::vector<Part>(peers)](const Task& task) mutable {
          for (int64_t p = 0; p < peers; ++p) {
            for (auto* part : {&parts[p].rows, &parts[p].cols, &parts[p].distill}) part->assign(problem_.side, start);
            similarities(p, task, S.data());
            tile(p, task, S.data(), parts[p]);
          }
          turns.take(task.I, task.turn_I, [&] {
            for (int64_t p = 0; p < peers; ++p) {
              if (problem_.contrast) add(p, task.I, problem_.kind_of(task.I), parts[p].rows);
              if (problem_.distills(task)) add(p, task.I, kDistill, parts[p].distill);
            }
          });
          if (task.I == task.J) return;
          turns.take(task.J, task.turn_J, [&] {
            for (int64_t p = 0; p < peers && problem_.contrast; ++p)
              add(p, task.J, problem_.kind_of(task.J), parts[p].cols);
          });
        };
  });
  return result;
}

template <typename T>
at::Tensor Sweeps<T>::maxima() {
  const auto tile = [&](int64_t, const Task& task, const T* S, Part& part) {
    std::vector<T> rows(problem_.side, static_cast<T>(problem_.masked)), cols = rows;
    kernels_.maxima(S, problem_.blocks[task.I].images, problem_.side, rows.data(), cols.data());
    for (int64_t i = 0; i < problem_.side; ++i) {
      part.rows[i] = static_cast<double>(rows[i]) * problem_.inverse_tau[kView1];
      part.cols[i] = static_cast<double>(cols[i]) * problem_.inverse_tau[kView1];
      part.distill[i] = static_cast<double>(rows[i]) * problem_.inverse_tau[kDistill];
    }
  };
  maxima_ =
      first_sweep(-std::numeric_limits<double>::infinity(), tile, [](double a, double b) { return std::max(a, b); });
  return maxima_;
}

template <typename T>
at::Tensor Sweeps<T>::sums() {
  TORCH_CHECK_VALUE(!needs_maxima() || maxima_.defined(), "sums: maxima comes first, these temperatures need offsets");
  for (size_t p = 0; p < z_.size() && needs_maxima(); ++p) {
    rows_[p].take_maxima(problem_, maxima_.template const_data_ptr<double>() + p * kKinds * problem_.N);
  }
  const auto tile = [&](int64_t p, const Task& task, const T* S, Part& part) {
    const int64_t rows = problem_.blocks[task.I].images;
    auto* cols = task.I == task.J ? nullptr : part.cols.data();
    if (problem_.contrast)
      kernels_.exponential_sums(S, rows, problem_.side, exponent(p, kView1, task), part.rows.data(), cols);
    if (problem_.distills(task)) {
      kernels_.exponential_sums(S, rows, problem_.side, exponent(p, kDistill, task), part.distill.data(), nullptr);
    }
  };
  sums_ = first_sweep(0, tile, [](double a, double b) { return a + b; });
  return sums_;
}

// -- sweep 2 ---------------------------------------------------------------------------------------------------------

// Both peers' KLs of the tile's rows and, to `differentiate`, their weights W_ij in place of S.
template <typename T>
void Sweeps<T>::weigh(const Task& task, const Buffer<T>& ratios, bool differentiate, Tile<T>& tile) const {
  const int64_t side = problem_.side, rows = problem_.blocks[task.I].images;
  const int64_t at_I = task.I * side, at_J = task.J * side;
  for (size_t p = 0; p < z_.size(); ++p) similarities(p, task, tile.S[p].data());
  if (problem_.distills(task)) {
    Distill<T> row{static_cast<T>(problem_.inverse_tau[kDistill]), {}, {}, ratios.data() + at_I, {}};
    for (size_t p = 0; p < 2; ++p) {
      tile.kl[p].assign(side, 0);
      row.offsets[p] = exponent(p, kDistill, task).row_offsets;
      row.inverse_sums[p] = rows_[p].distill.data() + at_I;
      row.values[p] = tile.kl[p].data();
    }
    kernels_.distill(tile.S[0].data(), tile.S[1].data(), rows, side, row, tile.Q.data());
  }
  for (size_t p = 0; p < z_.size() && differentiate; ++p) {
    const auto& contrast = rows_[p].contrast;
    // Q is P_a - P_b
    const auto factor = static_cast<T>(p == 0 ? problem_.kl_factor[0] : -problem_.kl_factor[1]);
    kernels_.weights(
        tile.S[p].data(), rows, side, exponent(p, kView1, task), problem_.contrast ? contrast.data() + at_I : nullptr,
        contrast.data() + at_J, problem_.distills(task) ? tile.Q.data() : nullptr, factor);
    if (task.I == task.J || !problem_.same_images(task)) continue;
    for (int64_t i = 0; i < rows; ++i) tile.S[p][i * side + i] = rows_[p].positive[at_I + i];
  }
}

// Adds W z to the gradients, where there are any; returns the sums of both KLs over this rank's rows, but for
// positives.
template <typename T>
std::array<double, 2> Sweeps<T>::second_sweep(std::vector<Gradients<T>>& gradients) const {
  const bool differentiate = !gradients.empty();
  const int64_t side = problem_.side;
  const auto own = [&](int32_t block) { return problem_.blocks[block].own; };
  const auto tasks = choose(pairs_, problem_.count(), [&](const Task& task) {
    return differentiate ? own(task.I) || own(task.J) : problem_.distills(task) && own(task.I);
  });
  const auto ratios = problem_.distill ? log_ratios(problem_, rows_[0], rows_[1]) : Buffer<T>();
  std::vector<std::array<double, 2>> values(problem_.count());  // a block of rows
  run(tasks, problem_.count(), [&](Turns& turns) {
    Tile<T> scratch;
    for (size_t p = 0; p < z_.size(); ++p) scratch.S[p] = Buffer<T>(side * side);
    if (problem_.distill) scratch.Q = Buffer<T>(side * side);
    return [&, tile = std::move(scratch)](const Task& task) mutable {
      weigh(task, ratios, differentiate, tile);
      turns.take(task.I, task.turn_I, [&] {
        if (!own(task.I)) return;
        for (size_t p = 0; p < 2 && problem_.distills(task); ++p) {
          for (const double value : tile.kl[p]) values[task.I][p] += value;
        }
        for (size_t p = 0; p < gradients.size(); ++p) {
          auto* to = gradients[p].block(task.I);
          multiply(tile.S[p].data(), z_[p].block(task.J), to, side, z_[p].D, side, true);
        }
      });
      if (task.I == task.J) return;
      turns.take(task.J, task.turn_J, [&] {
        for (size_t p = 0; p < gradients.size() && own(task.J); ++p) {
          auto* to = gradients[p].transposed(task.J);
          multiply(z_[p].transposed(task.I), tile.S[p].data(), to, z_[p].D, side, side, true);
        }
      });
    };
  });
  std::array<double, 2> kl{};
  for (const auto& block : values) {
    for (size_t p = 0; p < 2; ++p) kl[p] += block[p];
  }
  return kl;
}

template <typename T>
std::tuple<at::Tensor, std::vector<at::Tensor>> Sweeps<T>::finish(const std::vector<at::Tensor>& inverse_norms) {
  TORCH_CHECK_VALUE(sums_.defined(), "finish: sums comes first");
  TORCH_CHECK_VALUE(
      inverse_norms.empty() || inverse_norms.size() == z_.size(),
      "inverse_norms: one a peer or none is expected, found ", inverse_norms.size());
  for (const auto& norm : inverse_norms) {
    TORCH_CHECK_VALUE(
        norm.device().is_cpu() && norm.scalar_type() == at::kDouble && norm.is_contiguous()
            && norm.sizes() == at::IntArrayRef({2, problem_.n}),
        "inverse_norms: float64 [2, ", problem_.n, "] on the CPU is expected, found ", norm.scalar_type(),
        norm.sizes());
  }
  const auto peers = static_cast<int64_t>(z_.size());
  auto values = at::zeros({peers, 2}, at::kDouble);
  auto* value = values.template mutable_data_ptr<double>();
  for (int64_t p = 0; p < peers; ++p) {
    const auto* sums = sums_.template const_data_ptr<double>() + p * kKinds * problem_.N;
    value[2 * p] = rows_[p].take_sums(problem_, sums, unit_[p]);
  }
  for (int64_t p = 0; p < peers; ++p) {
    rows_[p].weigh_positives(problem_, problem_.kl_factor[p], problem_.distill ? &rows_[1 - p] : nullptr);
  }
  std::vector<Gradients<T>> gradients;
  for (size_t p = 0; p < inverse_norms.size(); ++p) gradients.emplace_back(z_[p].D, problem_.blocks, problem_.side);
  const auto kl = second_sweep(gradients);
  for (int64_t p = 0; p < peers && problem_.distill; ++p) {
    value[2 * p + 1] = problem_.kl_share * (kl[p] + positives_kl(problem_, rows_[p], rows_[1 - p]));
  }
  std::vector<at::Tensor> raw;
  for (size_t p = 0; p < gradients.size(); ++p) {
    raw.push_back(gradients[p].project(z_[p], problem_.blocks, inverse_norms[p], problem_.first_image));
  }
  return {values, raw};
}

}  // namespace

std::unique_ptr<Loss> make_loss(const std::vector<at::Tensor>& z, const Settings& settings) {
  if (z[0].scalar_type() == at::kDouble) return std::make_unique<Sweeps<double>>(z, settings);
  return std::make_unique<Sweeps<float>>(z, settings);
}

}  // namespace dogo
