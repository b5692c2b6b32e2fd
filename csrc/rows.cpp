#include "rows.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace dogo {

Softmax::Softmax(double log_rest, double positive) {
  const double a = log_rest - positive;
  left = 1 / (1 + std::exp(-a));
  loss = a > 0 ? a + std::log1p(std::exp(-a)) : std::log1p(std::exp(a));
  log_sum = positive + loss;
}

template <typename T>
void Rows<T>::take_maxima(const Problem& problem, const double* maxima) {
  const auto take = [&](Buffer<T>& offset, bool kl) {
    if (!problem.offsets[kl ? kDistill : kView1]) return;
    offset = Buffer<T>(problem.count() * problem.side);
    for (int32_t b = 0; b < problem.count(); ++b) {
      const auto* from = maxima + (kl ? kDistill : problem.kind_of(b)) * problem.N + problem.blocks[b].first_image;
      std::copy_n(from, problem.blocks[b].images, offset.begin() + b * problem.side);
    }
  };
  take(contrast_offset, false);
  take(distill_offset, true);
}

template <typename T>
double Rows<T>::take_sums(const Problem& problem, const double* sums, const at::Tensor& z) {
  const int64_t N = problem.N, D = z.size(2);
  const auto* unit = z.const_data_ptr<T>();
  softmax = Buffer<Softmax>(kKinds * N);
  for (auto* values : {&contrast, &distill, &positive}) *values = Buffer<T>(problem.count() * problem.side);

  // What exp(s / tau - offset) is multiplied with to be P.
  const auto finish = [&](Kind kind, int64_t image, int64_t row, double cosine) {
    const auto& offsets = kind == kDistill ? distill_offset : contrast_offset;
    const double offset = offsets.empty() ? 0 : offsets[row];
    auto& found = softmax[kind * N + image];
    found = Softmax(offset + std::log(sums[kind * N + image]), cosine * problem.inverse_tau[kind]);
    return std::exp(offset - found.log_sum);
  };
  at::parallel_for(0, problem.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < problem.blocks[b].images; ++i) {
        const int64_t image = problem.blocks[b].first_image + i, row = b * problem.side + i;
        double cosine = 0;
        for (int64_t d = 0; d < D; ++d) cosine += static_cast<double>(unit[image * D + d]) * unit[(N + image) * D + d];
        if (problem.contrast) {
          contrast[row] = static_cast<T>(problem.contrast_factor * finish(problem.kind_of(b), image, row, cosine));
        }
        if (problem.distill && problem.kind_of(b) == kView1) {
          distill[row] = static_cast<T>(finish(kDistill, image, row, cosine));
        }
      }
    }
  });
  // In partial sums of one block each, which lose fewer digits than one sum over all.
  double loss = 0;
  for (int32_t b = 0; b < problem.count(); ++b) {
    const auto* first = softmax.data() + problem.kind_of(b) * N + problem.blocks[b].first_image;
    double part = 0;
    for (int64_t i = 0; i < problem.blocks[b].images; ++i) part += first[i].loss;
    loss += part;
  }
  return loss / (2.0 * static_cast<double>(N));
}

template <typename T>
void Rows<T>::weigh_positives(const Problem& problem, double factor, const Rows* other) {
  const int64_t N = problem.N;
  for (int32_t b = 0; b < problem.count() && problem.kind_of(b) == kView1; ++b) {
    for (int64_t i = 0; i < problem.blocks[b].images; ++i) {
      const int64_t image = problem.blocks[b].first_image + i;
      double weight = -problem.contrast_factor * (softmax[image].left + softmax[N + image].left);
      if (other) weight += factor * (other->softmax[kDistill * N + image].left - softmax[kDistill * N + image].left);
      positive[b * problem.side + i] = static_cast<T>(weight);
    }
  }
}

template <typename T>
double positives_kl(const Problem& problem, const Rows<T>& own, const Rows<T>& other) {
  double total = 0;
  for (int64_t image = problem.first_image; image < problem.first_image + problem.n; ++image) {
    const auto &mine = own.softmax[kDistill * problem.N + image], &theirs = other.softmax[kDistill * problem.N + image];
    total += (1 - theirs.left) * (mine.loss - theirs.loss) + (theirs.left - mine.left);
  }
  return total;
}

template <typename T>
Buffer<T> log_ratios(const Problem& problem, const Rows<T>& a, const Rows<T>& b) {
  Buffer<T> ratios(problem.count() * problem.side);
  for (int32_t block = 0; block < problem.count(); ++block) {
    for (int64_t i = 0; i < problem.blocks[block].images; ++i) {
      const int64_t row = kDistill * problem.N + problem.blocks[block].first_image + i;
      ratios[block * problem.side + i] = static_cast<T>(a.softmax[row].log_sum - b.softmax[row].log_sum);
    }
  }
  return ratios;
}

template struct Rows<float>;
template struct Rows<double>;
template double positives_kl(const Problem&, const Rows<float>&, const Rows<float>&);
template double positives_kl(const Problem&, const Rows<double>&, const Rows<double>&);
template Buffer<float> log_ratios(const Problem&, const Rows<float>&, const Rows<float>&);
template Buffer<double> log_ratios(const Problem&, const Rows<double>&, const Rows<double>&);

}  // namespace dogo
