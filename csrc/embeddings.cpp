#include "embeddings.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

namespace dogo {
namespace {

constexpr int64_t kGrain = 1 << 12;  // entries that are worth a thread, some 8 us

int64_t rows_a_thread(int64_t D) { return std::max<int64_t>(1, kGrain / D); }

// Reduces in 16 partial results, so that one does not wait for the last: compilers do not reorder sums by themselves.
template <typename R, typename T, typename Fold>
std::array<R, 16> fold(const T* x, int64_t D, const Fold& into) {
  std::array<R, 16> lanes{};
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] = into(lanes[lane], x[d + lane]);
  }
  for (; d < D; ++d) lanes[0] = into(lanes[0], x[d]);
  return lanes;
}

template <typename T>
double normalize_row(const T* x, T* z, int64_t D) {
  const auto peaks = fold<T>(x, D, [](T a, T entry) { return std::max(a, std::abs(entry)); });
  const T largest = *std::max_element(peaks.begin(), peaks.end());
  // By a power of two, which rounds nothing; in two steps, as that of a denormal double is no double itself.
  int exponent = 0;
  std::frexp(largest, &exponent);
  const bool tiny = largest > 0 && exponent < -1000;
  const double scale = largest > 0 ? std::ldexp(1.0, -exponent - (tiny ? 100 : 0)) : 1, rest = tiny ? 0x1p100 : 1;
  const auto scaled = [&](T entry) { return entry * scale * rest; };
  const auto squares = fold<double>(x, D, [&](double a, T entry) { return a + scaled(entry) * scaled(entry); });
  const double square = std::accumulate(squares.begin(), squares.end(), 0.0);
  const double inverse = 1 / std::max(std::sqrt(square), 1e-12);  // as in reference.py: a row of zeros stays zero
  if (!std::isfinite(square)) {
    std::fill(z, z + D, std::numeric_limits<T>::quiet_NaN());
    return std::numeric_limits<double>::quiet_NaN();
  }
  for (int64_t d = 0; d < D; ++d) z[d] = static_cast<T>(scaled(x[d]) * inverse);
  // At most what T holds: infinity times an entry of zero would make the gradient NaN.
  return std::min(inverse * scale * rest, static_cast<double>(std::numeric_limits<T>::max()));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> normalize(const at::Tensor& x, const at::Tensor& y) {
  const int64_t n = x.size(0), D = x.size(1);
  auto z = at::empty({2, n, D}, x.options());
  auto inverse_norm = at::empty({2, n}, x.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "normalize", [&] {
    for (int view = 0; view < 2; ++view) {
      const auto raw = (view ? y : x).contiguous();
      const auto* from = raw.const_data_ptr<scalar_t>();
      auto* to = z.mutable_data_ptr<scalar_t>() + view * n * D;
      auto* inverse = inverse_norm.mutable_data_ptr<double>() + view * n;
      at::parallel_for(0, n, rows_a_thread(D), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) inverse[i] = normalize_row(from + i * D, to + i * D, D);
      });
    }
  });
  return {z, inverse_norm};
}

template <typename T>
Packed<T>::Packed(const at::Tensor& z, const std::vector<Block>& blocks, int64_t side)
    : side(side), D(z.size(2)), rows(blocks.size() * side * D), columns(blocks.size() * side * D) {
  const auto* from = z.const_data_ptr<T>();
  const int64_t N = z.size(1);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto* block = from + (blocks[b].view * N + blocks[b].first_image) * D;
      std::copy_n(block, blocks[b].images * D, rows.data() + b * side * D);
      auto* to = columns.data() + b * side * D;
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t i = 0; i < blocks[b].images; ++i) to[d * side + i] = block[i * D + d];
      }
    }
  });
}

template <typename T>
Gradients<T>::Gradients(int64_t D, const std::vector<Block>& blocks, int64_t side) : side(side), D(D) {
  int32_t own = 0;
  for (const auto& block : blocks) place.push_back(block.own ? own++ : -1);
  rows = Buffer<T>(own * side * D);
  columns = Buffer<T>(own * side * D);
}

template <typename T>
at::Tensor Gradients<T>::project(
    const Packed<T>& z, const std::vector<Block>& blocks, const at::Tensor& inverse_norm, int64_t first_image) const {
  const int64_t n = inverse_norm.size(1);
  auto dx = at::empty({2, n, D}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  auto* out = dx.template mutable_data_ptr<T>();
  const auto* inverse = inverse_norm.const_data_ptr<double>();
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> g(D);
    for (int64_t b = begin; b < end; ++b) {
      if (!blocks[b].own) continue;
      const T *by_row = rows.data() + place[b] * side * D, *by_column = columns.data() + place[b] * side * D;
      for (int64_t i = 0; i < blocks[b].images; ++i) {
        const T* unit = z.block(b) + i * D;
        double dot = 0;
        for (int64_t d = 0; d < D; ++d) {
          g[d] = by_row[i * D + d] + by_column[d * side + i];
          dot += static_cast<double>(g[d]) * unit[d];
        }
        const int64_t row = blocks[b].view * n + blocks[b].first_image - first_image + i;
        for (int64_t d = 0; d < D; ++d) {
          out[row * D + d] = static_cast<T>((g[d] - dot * unit[d]) * inverse[row]);
        }
      }
    }
  });
  return dx;
}

template struct Packed<float>;
template struct Packed<double>;
template struct Gradients<float>;
template struct Gradients<double>;

}  // namespace dogo
