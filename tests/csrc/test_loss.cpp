// Tiles, rows and losses against plain loops in double; the sanitizers watch.
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>

#include <array>
#include <limits>
#include <random>

#include "check.h"
#include "embeddings.h"
#include "loss.h"
#include "multiply.h"
#include "tiles.h"

using namespace dogo;

template <typename T>
static std::vector<T> random_values(size_t count, double low, double high, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<T> values(count);
  for (auto& value : values) value = static_cast<T>(uniform(generator));
  return values;
}

template <typename T>
static void check_multiply() {
  const double epsilon = 100 * std::numeric_limits<T>::epsilon();
  for (const auto& [rows, cols, inner] : {std::array<int64_t, 3>{16, 16, 1}, {48, 32, 7}, {5, 64, 130}}) {
    const auto A = random_values<T>(rows * inner, -1, 1, 1), B = random_values<T>(inner * cols, -1, 1, 2);
    std::vector<T> C(rows * cols, std::numeric_limits<T>::quiet_NaN());
    for (const bool add : {false, true}) {
      multiply(A.data(), B.data(), C.data(), rows, cols, inner, add);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          double wanted = 0;
          for (int64_t k = 0; k < inner; ++k) wanted += static_cast<double>(A[i * inner + k]) * B[k * cols + j];
          CHECK_NEAR(C[i * cols + j], (add ? 2 : 1) * wanted, epsilon, epsilon * static_cast<double>(inner));
        }
      }
    }
  }
}

TEST(products) {
  check_multiply<float>();
  check_multiply<double>();
}

template <typename T>
static void check_tiles(bool offsets) {
  const double epsilon = 200 * std::numeric_limits<T>::epsilon();
  const auto& kernels = tile_kernels<T>();
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 16}, {17, 32}, {128, 128}}) {
    const T scale = 5;
    const auto S_a = random_values<T>(rows * cols, -1, 1, 3), S_b = random_values<T>(rows * cols, -1, 1, 4);
    const auto row_offset = random_values<T>(rows, 0, 2, 5), col_offset = random_values<T>(cols, 0, 2, 6);
    const auto row_weight = random_values<T>(rows, 0, 1, 7), col_weight = random_values<T>(cols, 0, 1, 8);
    const auto ratio = random_values<T>(rows, -1, 1, 9);
    const auto e = [&](T s, T offset) { return std::exp(static_cast<double>(scale) * s - (offsets ? offset : 0)); };
    const Exponent<T> exponent{scale, offsets ? row_offset.data() : nullptr, offsets ? col_offset.data() : nullptr};

    std::vector<double> row_sum(rows, 1), col_sum(cols, 2), row_alone(rows), kl_a(rows, 3), kl_b(rows, 4);
    std::vector<T> row_max(rows, -9), col_max(cols, -9), Q(rows * cols), W = S_a, W_alone = S_a, shares(rows * cols);
    kernels.maxima(S_a.data(), rows, cols, row_max.data(), col_max.data());
    kernels.exponential_sums(S_a.data(), rows, cols, exponent, row_sum.data(), col_sum.data());
    kernels.exponential_sums(S_a.data(), rows, cols, exponent, row_alone.data(), nullptr);
    const Distill<T> distill{
        scale,
        {offsets ? row_offset.data() : nullptr, offsets ? row_offset.data() : nullptr},
        {row_weight.data(), row_weight.data()},
        ratio.data(),
        {kl_a.data(), kl_b.data()}};
    kernels.distill(S_a.data(), S_b.data(), rows, cols, distill, Q.data());
    const T factor = -3;
    kernels.weights(W.data(), rows, cols, exponent, row_weight.data(), col_weight.data(), Q.data(), factor);
    kernels.weights(W_alone.data(), rows, cols, exponent, row_weight.data(), col_weight.data(), nullptr, factor);
    kernels.weights(shares.data(), rows, cols, exponent, nullptr, nullptr, Q.data(), factor);

    std::vector<double> col_wanted(cols, 2), col_highest(cols, -9);
    for (int64_t i = 0; i < rows; ++i) {
      double row_wanted = 1, row_highest = -9, kl_a_wanted = 3, kl_b_wanted = 4;
      for (int64_t j = 0; j < cols; ++j) {
        const T s_a = S_a[i * cols + j], s_b = S_b[i * cols + j];
        row_wanted += e(s_a, row_offset[i]);
        col_wanted[j] += e(s_a, col_offset[j]);
        row_highest = std::max<double>(row_highest, s_a);
        col_highest[j] = std::max<double>(col_highest[j], s_a);
        const double P_a = e(s_a, row_offset[i]) * row_weight[i], P_b = e(s_b, row_offset[i]) * row_weight[i];
        const double log_ratio = static_cast<double>(scale) * (static_cast<double>(s_b) - s_a) + ratio[i];
        kl_a_wanted += P_b * log_ratio + P_a - P_b;
        kl_b_wanted += -P_a * log_ratio - P_a + P_b;
        CHECK_NEAR(Q[i * cols + j], P_a - P_b, epsilon, epsilon * (P_a + P_b));
        const double w = e(s_a, row_offset[i]) * row_weight[i] + e(s_a, col_offset[j]) * col_weight[j];
        CHECK_NEAR(W_alone[i * cols + j], w, epsilon, 0);
        CHECK_NEAR(W[i * cols + j], w - 3 * (P_a - P_b), epsilon, epsilon * (w + 3 * (P_a + P_b)));
        CHECK_NEAR(shares[i * cols + j], -3 * (P_a - P_b), epsilon, epsilon * 3 * (P_a + P_b));
      }
      CHECK_NEAR(row_sum[i], row_wanted, epsilon, 0);
      CHECK_NEAR(row_alone[i], row_wanted - 1, epsilon, 0);
      CHECK_NEAR(row_max[i], row_highest, 0, 0);
      CHECK_NEAR(kl_a[i], kl_a_wanted, epsilon, epsilon * 1000);
      CHECK_NEAR(kl_b[i], kl_b_wanted, epsilon, epsilon * 1000);
    }
    for (int64_t j = 0; j < cols; ++j) {
      CHECK_NEAR(col_sum[j], col_wanted[j], epsilon, 0);
      CHECK_NEAR(col_max[j], col_highest[j], 0, 0);
    }
  }
}

TEST(tiles) {
  for (const bool offsets : {false, true}) {
    check_tiles<float>(offsets);
    check_tiles<double>(offsets);
  }
}

TEST(not_a_number_stays) {
  std::vector<float> S(16, 0.5f), row_max(1, -1), col_max(16, -1);
  S[3] = std::numeric_limits<float>::quiet_NaN();
  std::vector<double> row_sum(1), col_sum(16);
  tile_kernels<float>().maxima(S.data(), 1, 16, row_max.data(), col_max.data());
  tile_kernels<float>().exponential_sums(S.data(), 1, 16, {1, nullptr, nullptr}, row_sum.data(), col_sum.data());
  CHECK(std::isnan(row_max[0]) && std::isnan(col_max[3]) && col_max[2] == 0.5f);
  CHECK(std::isnan(row_sum[0]) && std::isnan(col_sum[3]) && std::isfinite(col_sum[2]));
}

// NT-Xent of raw rows [2, N, D] and KL(P_b || P_a), from the definition.
static double unit_product(const std::vector<double>& z, int64_t D, int64_t i, int64_t j) {
  double dot = 0, a = 0, b = 0;
  for (int64_t d = 0; d < D; ++d) {
    dot += z[i * D + d] * z[j * D + d];
    a += z[i * D + d] * z[i * D + d];
    b += z[j * D + d] * z[j * D + d];
  }
  return dot / std::sqrt(a * b);
}

static double ntxent(const std::vector<double>& z, int64_t N, int64_t D, double tau) {
  double loss = 0;
  for (int64_t i = 0; i < 2 * N; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < 2 * N; ++j) sum += j == i ? 0 : std::exp((unit_product(z, D, i, j) - 1) / tau);
    loss += std::log(sum) - (unit_product(z, D, i, (i + N) % (2 * N)) - 1) / tau;
  }
  return loss / (2.0 * static_cast<double>(N));
}

static double kl(
    const std::vector<double>& z_a, const std::vector<double>& z_b, int64_t N, int64_t D_a, int64_t D_b, double tau) {
  double total = 0;
  for (int64_t i = 0; i < N; ++i) {
    double sum_a = 0, sum_b = 0;
    for (int64_t j = 0; j < N; ++j) {
      sum_a += std::exp((unit_product(z_a, D_a, i, N + j) - 1) / tau);
      sum_b += std::exp((unit_product(z_b, D_b, i, N + j) - 1) / tau);
    }
    for (int64_t j = 0; j < N; ++j) {
      const double log_a = (unit_product(z_a, D_a, i, N + j) - 1) / tau - std::log(sum_a);
      const double log_b = (unit_product(z_b, D_b, i, N + j) - 1) / tau - std::log(sum_b);
      total += std::exp(log_b) * (log_b - log_a);
    }
  }
  return total / static_cast<double>(N);
}

static at::Tensor matrix(std::vector<double>& values, int64_t first, int64_t N, int64_t D) {
  return at::from_blob(values.data() + first * D, {N, D}, at::kDouble);
}

TEST(losses_and_gradients) {
  const double tau_c = 0.3, tau_d = 0.2;
  for (const auto& [N, D_a, D_b] : {std::array<int64_t, 3>{2, 1, 3}, {17, 5, 9}, {70, 3, 2}}) {
    auto a = random_values<double>(2 * N * D_a, -1, 1, 10), b = random_values<double>(2 * N * D_b, -1, 1, 11);
    const auto total = [&] { return ntxent(a, N, D_a, tau_c) + 2 * kl(a, b, N, D_a, D_b, tau_d); };
    const auto [z_a, norm_a] = normalize(matrix(a, 0, N, D_a), matrix(a, N, N, D_a));
    const auto [z_b, norm_b] = normalize(matrix(b, 0, N, D_b), matrix(b, N, N, D_b));
    const auto loss = make_loss({z_a, z_b}, {N, 1, 0, tau_c, tau_d, {2, 0.5}, false});
    CHECK(!loss->needs_maxima());
    loss->sums();
    const auto [values, gradients] = loss->finish({norm_a, norm_b});
    const auto* value = values.const_data_ptr<double>();
    CHECK_NEAR(value[0], ntxent(a, N, D_a, tau_c), 1e-12, 0);
    CHECK_NEAR(value[1], kl(a, b, N, D_a, D_b, tau_d), 1e-10, 1e-14);
    CHECK_NEAR(value[2], ntxent(b, N, D_b, tau_c), 1e-12, 0);
    const auto* gradient = gradients[0].const_data_ptr<double>();
    for (const int64_t k : {int64_t{0}, N * D_a - 1, N * D_a, 2 * N * D_a - 1}) {
      const double kept = a[k], step = 1e-5;
      a[k] = kept + step;
      const double above = total();
      a[k] = kept - step;
      const double slope = (above - total()) / (2 * step);
      a[k] = kept;
      CHECK_NEAR(gradient[k], slope, 1e-6, 1e-9);
    }
  }
}

template <typename T>
static void check_offsets() {
  const int64_t N = 40, D = 6;
  const auto a = random_values<T>(2 * N * D, -1, 1, 12);
  const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
  const auto x = at::from_blob(const_cast<T*>(a.data()), {N, D}, options);
  const auto y = at::from_blob(const_cast<T*>(a.data()) + N * D, {N, D}, options);
  const double tau =
      sizeof(T) == 4 ? 0.015 : 0.003;  // offsets are needed, and exponentials still fit the oracle's double
  const auto [z, norm] = normalize(x, y);
  const auto loss = make_loss({z}, {N, 1, 0, tau, std::nullopt, {0}, false});
  CHECK(loss->needs_maxima());
  loss->maxima();
  loss->sums();
  const auto [values, gradients] = loss->finish({norm});
  CHECK_NEAR(
      values.template const_data_ptr<double>()[0], ntxent(std::vector<double>(a.begin(), a.end()), N, D, tau),
      1e3 * std::numeric_limits<T>::epsilon(), 0);
  for (int64_t k = 0; k < 2 * N * D; ++k) CHECK(std::isfinite(gradients[0].template const_data_ptr<T>()[k]));
}

TEST(temperatures_that_need_offsets) {
  check_offsets<float>();
  check_offsets<double>();
}

int main() {
  at::set_num_threads(2);
  for (const auto& test : Test::all()) {
    std::printf("%s\n", test.name.c_str());
    test.body();
  }
  return 0;
}
