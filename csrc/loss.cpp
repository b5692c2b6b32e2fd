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
// Work, forward and backward: 4 M^2 D FLOP a peer (plain PyTorch: 6), M^2 + N^2 exponentials a peer.  Memory: five
// times z, and three tiles a thread.
#include "loss.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "embeddings.h"
#include "multiply.h"
#include "tiles.h"

namespace dogo {
namespace {

// Without offsets a row's sum lies between exp(-1 / tau) and M exp(1 / tau).  50 keeps it, and 1 / l_i over M, normal
// in float32 (1e-38) up to M = 2^26, and takes in tau = 0.02.
template <typename T>
constexpr double kLargestLogit = sizeof(T) == 4 ? 50.000001 : 300.0;

enum Kind { kView1, kView2, kDistill, kKinds };  // of softmax: NT-Xent of rows of either view, KL of rows of view 1

// Blocks of equal size, so that all tiles have one shape.  64 images a block or 128: at D = 128 on two cores of an AMD
// EPYC (Zen 5) 0.41 and 0.53 ms at N = 128, 3.36 and 3.44 at 512, 12.3 and 12.6 at 1024, 47.6 and 48.2 at 2048
// (256: 46.7); smaller tiles keep more threads busy, larger ones keep narrow embeddings from waiting for exponentials'
// set-up.
int64_t side_of(int64_t n) {
  const int64_t most = n <= 512 ? 64 : kLargestTile;
  const int64_t blocks = (n + most - 1) / most;
  const int64_t images = (n + blocks - 1) / blocks;
  return (images + kColumnAlign - 1) / kColumnAlign * kColumnAlign;
}

// One row's softmax: others than its positive (`log_rest`, ln of their sum), and what the positive's logit adds.
struct Softmax {
  double log_sum = 0, left = 0, loss = 0;  // ln l_i, 1 - P(positive), -ln P(positive)

  Softmax() = default;
  Softmax(double log_rest, double positive) {
    const double a = log_rest - positive;
    left = 1 / (1 + std::exp(-a));
    loss = a > 0 ? a + std::log1p(std::exp(-a)) : std::log1p(std::exp(a));
    log_sum = positive + loss;
  }
};

// What sweep 2 needs of one peer: a value each row in the order of blocks, side_ for each; `softmax` by kind and image.
template <typename T>
struct Rows {
  std::vector<T> contrast_offset, distill_offset;  // empty where none are needed
  std::vector<T> contrast, distill;                // what turns exp(s / tau - offset) into W_ij's share, into P
  std::vector<T> positive;                         // W_ij of the positive, for rows of view 1
  std::vector<Softmax> softmax;                    // [3 N]
};

// What one tile of one peer gives to its rows (NT-Xent, and KL) and to its columns (NT-Xent alone).
struct Part {
  std::vector<double> rows, cols, distill;
};

template <typename T>
class Sweeps final : public Loss {
 public:
  Sweeps(const std::vector<at::Tensor>& z, const Settings& settings);

  bool needs_maxima() const override { return offsets_needed_[kView1] || offsets_needed_[kDistill]; }
  at::Tensor maxima() override;
  at::Tensor sums() override;
  std::tuple<at::Tensor, std::vector<at::Tensor>> finish(const std::vector<at::Tensor>& inverse_norms) override;

 private:
  bool contrast() const { return settings_.tau_contrast.has_value(); }
  bool distill() const { return settings_.tau_distill.has_value(); }
  bool distills(const Task& task) const { return distill() && blocks_[task.I].view != blocks_[task.J].view; }
  Kind kind_of(int32_t block) const { return blocks_[block].view == 0 ? kView1 : kView2; }
  int32_t count() const { return static_cast<int32_t>(blocks_.size()); }
  int64_t first_row(int32_t block) const { return block * side_; }

  void similarities(size_t p, const Task& task, T* S) const;
  Exponent<T> exponent(size_t p, Kind kind, const Task& task) const;
  template <typename Tile, typename Merge>
  at::Tensor first_sweep(double start, const Tile& tile, const Merge& merge) const;
  void spread_offsets(size_t p);
  double between(size_t p);
  void weigh_positives();
  double positives_kl(size_t p) const;
  void second_sweep(std::vector<Gradients<T>>& gradients, double* kl) const;

  const Settings settings_;
  const int64_t N_, side_;
  const std::vector<Block> blocks_;
  const TileKernels<T>& kernels_;
  std::array<double, kKinds> inverse_tau_;
  std::array<bool, kKinds> offsets_needed_;
  std::array<double, 2> kl_factor_{};  // of P_own - P_other in W_ij
  double kl_share_;                    // of a row's KL in the value
  T masked_;                           // a cosine whose exponential is 0 at either temperature with any offset
  std::vector<Task> pairs_;
  std::vector<at::Tensor> unit_;  // z as given
  std::vector<Packed<T>> z_;
  std::vector<Rows<T>> rows_;
  at::Tensor maxima_, sums_;
};

template <typename T>
Sweeps<T>::Sweeps(const std::vector<at::Tensor>& z, const Settings& settings)
    : settings_(settings),
      N_(settings.n * settings.world),
      side_(side_of(settings.n)),
      blocks_(make_blocks(settings.n, settings.world, settings.rank, side_)),
      kernels_(tile_kernels<T>()),
      unit_(z),
      rows_(z.size()) {
  const double tau_c = settings.tau_contrast.value_or(settings.tau_distill.value_or(1));
  const double tau_d = settings.tau_distill.value_or(tau_c);
  inverse_tau_ = {1 / tau_c, 1 / tau_c, 1 / tau_d};
  for (int kind = 0; kind < kKinds; ++kind) {
    offsets_needed_[kind] = (kind == kDistill ? distill() : contrast()) && inverse_tau_[kind] > kLargestLogit<T>;
  }
  masked_ = static_cast<T>(-3 - 1e4 * std::max(tau_c, tau_d));
  kl_share_ = 1.0 / static_cast<double>(settings.mean ? N_ * N_ : N_);
  for (size_t p = 0; p < z.size() && distill(); ++p) {
    kl_factor_[p] = settings.weights[p] * static_cast<double>(settings.world) * kl_share_ * inverse_tau_[kDistill];
  }
  for (const auto& unit : z) z_.emplace_back(unit, blocks_, side_);
  pairs_ = choose(all_pairs(count()), count(), [&](const Task& task) { return contrast() || distills(task); });
}

// -- one tile --------------------------------------------------------------------------------------------------------

// S = z_I z_J^T; rows with themselves, positives, and columns behind the last image masked.
template <typename T>
void Sweeps<T>::similarities(size_t p, const Task& task, T* S) const {
  multiply(z_[p].block(task.I), z_[p].transposed(task.J), S, side_, side_, z_[p].D, false);
  const int64_t rows = blocks_[task.I].images, cols = blocks_[task.J].images;
  const bool same_images = blocks_[task.I].first_image == blocks_[task.J].first_image;
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(S + i * side_ + cols, S + (i + 1) * side_, masked_);
    if (same_images) S[i * side_ + i] = masked_;
  }
}

template <typename T>
Exponent<T> Sweeps<T>::exponent(size_t p, Kind kind, const Task& task) const {
  const auto& offset = kind == kDistill ? rows_[p].distill_offset : rows_[p].contrast_offset;
  const auto scale = static_cast<T>(inverse_tau_[kind]);
  if (offset.empty()) return {scale, nullptr, nullptr};
  return {scale, offset.data() + first_row(task.I), offset.data() + first_row(task.J)};
}

// -- sweep 1 ---------------------------------------------------------------------------------------------------------

// float64 [peers, 3, N] of `start`, into which `merge` takes what `tile(p, task, S, part)` finds in this rank's share.
template <typename T>
template <typename Tile, typename Merge>
at::Tensor Sweeps<T>::first_sweep(double start, const Tile& tile, const Merge& merge) const {
  const auto peers = static_cast<int64_t>(z_.size());
  auto result = at::full({peers, kKinds, N_}, start, at::kDouble);
  auto* found = result.template mutable_data_ptr<double>();
  const auto add = [&](int64_t p, int32_t block, Kind kind, const std::vector<double>& part) {
    auto* to = found + (p * kKinds + kind) * N_ + blocks_[block].first_image;
    for (int64_t i = 0; i < blocks_[block].images; ++i) to[i] = merge(to[i], part[i]);
  };
  int64_t k = 0;  // ranks share the tiles
  const auto tasks = choose(pairs_, count(), [&](const Task&) { return k++ % settings_.world == settings_.rank; });
  run(tasks, count(), [&](Turns& turns) {
    return [&, S = std::vector<T>(side_ * side_), parts = std::vector<Part>(peers)](const Task& task) mutable {
      const at::AutoDispatchBelowADInplaceOrView guard;
      for (int64_t p = 0; p < peers; ++p) {
        for (auto* part : {&parts[p].rows, &parts[p].cols, &parts[p].distill}) part->assign(side_, start);
        similarities(p, task, S.data());
        tile(p, task, S.data(), parts[p]);
      }
      turns.take(task.I, task.turn_I, [&] {
        for (int64_t p = 0; p < peers; ++p) {
          if (contrast()) add(p, task.I, kind_of(task.I), parts[p].rows);
          if (distills(task)) add(p, task.I, kDistill, parts[p].distill);
        }
      });
      if (task.I == task.J) return;
      turns.take(task.J, task.turn_J, [&] {
        for (int64_t p = 0; p < peers && contrast(); ++p) add(p, task.J, kind_of(task.J), parts[p].cols);
      });
    };
  });
  return result;
}

template <typename T>
at::Tensor Sweeps<T>::maxima() {
  const auto tile = [&](int64_t, const Task& task, const T* S, Part& part) {
    std::vector<T> rows(side_, masked_), cols(side_, masked_);
    kernels_.maxima(S, blocks_[task.I].images, side_, rows.data(), cols.data());
    for (int64_t i = 0; i < side_; ++i) {
      part.rows[i] = static_cast<double>(rows[i]) * inverse_tau_[kView1];
      part.cols[i] = static_cast<double>(cols[i]) * inverse_tau_[kView1];
      part.distill[i] = static_cast<double>(rows[i]) * inverse_tau_[kDistill];
    }
  };
  maxima_ =
      first_sweep(-std::numeric_limits<double>::infinity(), tile, [](double a, double b) { return std::max(a, b); });
  return maxima_;
}

template <typename T>
at::Tensor Sweeps<T>::sums() {
  TORCH_CHECK_VALUE(!needs_maxima() || maxima_.defined(), "sums: maxima comes first, these temperatures need offsets");
  for (size_t p = 0; p < z_.size() && maxima_.defined(); ++p) spread_offsets(p);
  const auto tile = [&](int64_t p, const Task& task, const T* S, Part& part) {
    const int64_t rows = blocks_[task.I].images;
    auto* cols = task.I == task.J ? nullptr : part.cols.data();
    if (contrast()) kernels_.exponential_sums(S, rows, side_, exponent(p, kView1, task), part.rows.data(), cols);
    if (distills(task)) {
      kernels_.exponential_sums(S, rows, side_, exponent(p, kDistill, task), part.distill.data(), nullptr);
    }
  };
  sums_ = first_sweep(0, tile, [](double a, double b) { return a + b; });
  return sums_;
}

// Offsets of rows in the order of blocks, from the maxima of all ranks.
template <typename T>
void Sweeps<T>::spread_offsets(size_t p) {
  const auto* found = maxima_.template const_data_ptr<double>() + p * kKinds * N_;
  for (const bool kl : {false, true}) {
    if (!offsets_needed_[kl ? kDistill : kView1]) continue;
    auto& offset = kl ? rows_[p].distill_offset : rows_[p].contrast_offset;
    offset.assign(count() * side_, 0);
    for (int32_t b = 0; b < count(); ++b) {
      const auto* from = found + (kl ? kDistill : kind_of(b)) * N_ + blocks_[b].first_image;
      std::copy_n(from, blocks_[b].images, offset.begin() + first_row(b));
    }
  }
}

// -- between the sweeps ----------------------------------------------------------------------------------------------

// Fills rows_[p] but for the positives, from the sums of all ranks; returns NT-Xent of the global batch.
template <typename T>
double Sweeps<T>::between(size_t p) {
  auto& rows = rows_[p];
  const auto* sums = sums_.template const_data_ptr<double>() + p * kKinds * N_;
  const auto* z = unit_[p].template const_data_ptr<T>();
  const int64_t D = z_[p].D;
  const double factor = static_cast<double>(settings_.world) * inverse_tau_[kView1] / (2.0 * static_cast<double>(N_));
  rows.softmax.assign(kKinds * N_, {});
  for (auto* values : {&rows.contrast, &rows.distill, &rows.positive}) values->assign(count() * side_, 0);
  const auto finish_row = [&](Kind kind, int64_t image, int64_t at, double cosine) {
    const auto& offsets = kind == kDistill ? rows.distill_offset : rows.contrast_offset;
    const double offset = offsets.empty() ? 0 : offsets[at];
    auto& row = rows.softmax[kind * N_ + image];
    row = Softmax(offset + std::log(sums[kind * N_ + image]), cosine * inverse_tau_[kind]);
    return std::exp(offset - row.log_sum);
  };
  at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < blocks_[b].images; ++i) {
        const int64_t image = blocks_[b].first_image + i, at = first_row(b) + i;
        double cosine = 0;
        for (int64_t d = 0; d < D; ++d) cosine += static_cast<double>(z[image * D + d]) * z[(N_ + image) * D + d];
        if (contrast()) rows.contrast[at] = static_cast<T>(factor * finish_row(kind_of(b), image, at, cosine));
        if (distill() && blocks_[b].view == 0)
          rows.distill[at] = static_cast<T>(finish_row(kDistill, image, at, cosine));
      }
    }
  });
  double loss = 0;
  for (int64_t row = 0; row < kDistill * N_; ++row) loss += rows.softmax[row].loss;
  return loss / (2.0 * static_cast<double>(N_));
}

// W_ij of the positives: -(left_i + left_pos) of NT-Xent, and left_other - left_own of the KL.
template <typename T>
void Sweeps<T>::weigh_positives() {
  const double factor = static_cast<double>(settings_.world) * inverse_tau_[kView1] / (2.0 * static_cast<double>(N_));
  for (size_t p = 0; p < z_.size(); ++p) {
    const auto& own = rows_[p].softmax;
    for (int32_t b = 0; b < count(); ++b) {
      for (int64_t i = 0; i < blocks_[b].images && blocks_[b].view == 0; ++i) {
        const int64_t image = blocks_[b].first_image + i;
        double weight = 0;
        if (contrast()) weight -= factor * (own[image].left + own[N_ + image].left);
        if (distill()) {
          const auto& other = rows_[1 - p].softmax;
          weight += kl_factor_[p] * (other[kDistill * N_ + image].left - own[kDistill * N_ + image].left);
        }
        rows_[p].positive[first_row(b) + i] = static_cast<T>(weight);
      }
    }
  }
}

// The positives' part of KL(P_other || P_p) over this rank's rows, P_p - P_other added as in tiles.h.
template <typename T>
double Sweeps<T>::positives_kl(size_t p) const {
  double total = 0;
  const int64_t first = settings_.rank * settings_.n;
  for (int64_t image = first; image < first + settings_.n; ++image) {
    const auto &own = rows_[p].softmax[kDistill * N_ + image], &other = rows_[1 - p].softmax[kDistill * N_ + image];
    total += (1 - other.left) * (own.loss - other.loss) + (other.left - own.left);
  }
  return total;
}

// -- sweep 2 ---------------------------------------------------------------------------------------------------------

// Adds W z to the gradients, where there are any, and this rank's part of both KLs without positives to kl[2].
template <typename T>
void Sweeps<T>::second_sweep(std::vector<Gradients<T>>& gradients, double* kl) const {
  const bool differentiate = !gradients.empty();
  const auto tasks = choose(pairs_, count(), [&](const Task& task) {
    const bool own_I = blocks_[task.I].own, own_J = blocks_[task.J].own;
    return differentiate ? own_I || own_J : distills(task) && own_I;
  });
  std::vector<T> log_ratios(distill() ? count() * side_ : 0);
  for (int32_t b = 0; b < count() && distill(); ++b) {
    for (int64_t i = 0; i < blocks_[b].images; ++i) {
      const int64_t row = kDistill * N_ + blocks_[b].first_image + i;
      log_ratios[first_row(b) + i] = static_cast<T>(rows_[0].softmax[row].log_sum - rows_[1].softmax[row].log_sum);
    }
  }
  std::vector<std::array<double, 2>> values(count());  // a block of rows
  run(tasks, count(), [&](Turns& turns) {
    std::array<std::vector<T>, 2> S{};
    for (size_t p = 0; p < z_.size(); ++p) S[p].resize(side_ * side_);
    return [&, S, Q = std::vector<T>(distill() ? side_ * side_ : 0),
            kl_rows = std::array<std::vector<double>, 2>()](const Task& task) mutable {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const int64_t rows = blocks_[task.I].images, at_I = first_row(task.I), at_J = first_row(task.J);
      const bool positives = task.I != task.J && blocks_[task.I].first_image == blocks_[task.J].first_image;
      for (size_t p = 0; p < z_.size(); ++p) similarities(p, task, S[p].data());
      if (distills(task)) {
        Distill<T> row{static_cast<T>(inverse_tau_[kDistill]), {}, {}, log_ratios.data() + at_I, {}};
        for (size_t p = 0; p < 2; ++p) {
          kl_rows[p].assign(side_, 0);
          row.offsets[p] = exponent(p, kDistill, task).row_offsets;
          row.inverse_sums[p] = rows_[p].distill.data() + at_I;
          row.values[p] = kl_rows[p].data();
        }
        kernels_.distill(S[0].data(), S[1].data(), rows, side_, row, Q.data());
      }
      for (size_t p = 0; p < z_.size() && differentiate; ++p) {
        const auto& own = rows_[p].contrast;
        const auto factor = static_cast<T>(p == 0 ? kl_factor_[0] : -kl_factor_[1]);
        kernels_.weights(
            S[p].data(), rows, side_, exponent(p, kView1, task), contrast() ? own.data() + at_I : nullptr,
            own.data() + at_J, distills(task) ? Q.data() : nullptr, factor);
        for (int64_t i = 0; i < rows && positives; ++i) S[p][i * side_ + i] = rows_[p].positive[at_I + i];
      }
      turns.take(task.I, task.turn_I, [&] {
        if (!blocks_[task.I].own) return;
        for (size_t p = 0; p < 2 && distills(task); ++p) {
          for (int64_t i = 0; i < rows; ++i) values[task.I][p] += kl_rows[p][i];
        }
        for (size_t p = 0; p < gradients.size(); ++p) {
          multiply(S[p].data(), z_[p].block(task.J), gradients[p].block(task.I), side_, z_[p].D, side_, true);
        }
      });
      if (task.I == task.J) return;
      turns.take(task.J, task.turn_J, [&] {
        for (size_t p = 0; p < gradients.size() && blocks_[task.J].own; ++p) {
          multiply(z_[p].transposed(task.I), S[p].data(), gradients[p].transposed(task.J), z_[p].D, side_, side_, true);
        }
      });
    };
  });
  for (const auto& block : values) {
    for (int p = 0; p < 2; ++p) kl[p] += block[p];
  }
}

template <typename T>
std::tuple<at::Tensor, std::vector<at::Tensor>> Sweeps<T>::finish(const std::vector<at::Tensor>& inverse_norms) {
  TORCH_CHECK_VALUE(sums_.defined(), "finish: sums comes first");
  TORCH_CHECK_VALUE(
      inverse_norms.empty() || inverse_norms.size() == z_.size(),
      "inverse_norms: one a peer or none is expected, found ", inverse_norms.size());
  for (const auto& norm : inverse_norms) {
    TORCH_CHECK_VALUE(
        norm.scalar_type() == at::kDouble && norm.is_contiguous() && norm.sizes() == at::IntArrayRef({2, settings_.n}),
        "inverse_norms: float64 [2, ", settings_.n, "] is expected, found ", norm.scalar_type(), norm.sizes());
  }
  const auto peers = static_cast<int64_t>(z_.size());
  auto values = at::zeros({peers, 2}, at::kDouble);
  auto* value = values.template mutable_data_ptr<double>();
  for (int64_t p = 0; p < peers; ++p) {
    const double loss = between(p);
    if (contrast()) value[2 * p] = loss;
  }
  weigh_positives();
  std::vector<Gradients<T>> gradients;
  for (size_t p = 0; p < inverse_norms.size(); ++p) gradients.emplace_back(z_[p].D, blocks_, side_);
  double kl[2] = {0, 0};
  if (distill() || !gradients.empty()) second_sweep(gradients, kl);
  for (int64_t p = 0; p < peers && distill(); ++p) value[2 * p + 1] = kl_share_ * (kl[p] + positives_kl(p));
  std::vector<at::Tensor> raw;
  for (size_t p = 0; p < gradients.size(); ++p) {
    raw.push_back(gradients[p].project(z_[p], blocks_, inverse_norms[p], settings_.rank * settings_.n));
  }
  return {values, raw};
}

}  // namespace

std::unique_ptr<Loss> make_loss(const std::vector<at::Tensor>& z, const Settings& settings) {
  if (z[0].scalar_type() == at::kDouble) return std::make_unique<Sweeps<double>>(z, settings);
  return std::make_unique<Sweeps<float>>(z, settings);
}

}  // namespace dogo
