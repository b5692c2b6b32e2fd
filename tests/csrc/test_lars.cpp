// LARS on a CPU against a loop in double, for the sanitizers: odd sizes, gaps, both kinds of gradients.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "lars.h"

#undef CHECK  // torch's
#include "check.h"

using namespace dogo;

namespace {

at::Tensor made(at::IntArrayRef shape, double step) {
  const at::Tensor t = at::empty(shape, at::kFloat);
  for (int64_t i = 0; i < t.numel(); ++i) t.data_ptr<float>()[i] = static_cast<float>(std::sin(step * (i + 1)));
  return t;
}

void check(const at::Tensor& w, const at::Tensor& g, bool momentum) {
  const LarsGroup group{0.5, std::nullopt, momentum ? 0.9 : 0.0, 0.01, 0.02, true, true};
  const auto before = w.to(at::kDouble).contiguous(), gradient = g.to(at::kDouble).contiguous();
  double ww = 0, uu = 0;
  const double *x = before.const_data_ptr<double>(), *y = gradient.const_data_ptr<double>();
  for (int64_t i = 0; i < w.numel(); ++i) {
    ww += x[i] * x[i];
    uu += (y[i] + 0.01 * x[i]) * (y[i] + 0.01 * x[i]);
  }
  make_lars(at::kCPU)->step({{w}, {g}, {momentum ? at::zeros(w.sizes(), at::kFloat) : at::Tensor()}, {0}}, {group});
  const auto after = w.to(at::kDouble).contiguous();
  for (int64_t i = 0; i < w.numel(); ++i) {
    const double wanted = x[i] - 0.5 * 0.02 * std::sqrt(ww / uu) * (y[i] + 0.01 * x[i]);
    CHECK_NEAR(after.const_data_ptr<double>()[i], wanted, 1e-6, 1e-7);
  }
}

}  // namespace

TEST(steps_of_lars) {
  for (const int64_t n : {1, 3, 16, 17, 16383, 16385, 50001}) {
    check(made({n}, 0.7), made({n}, 0.3), true);
    check(made({n}, 0.7), made({n}, 0.3).to(at::kBFloat16), false);
    check(made({n + 1}, 0.7).slice(0, 1), made({2 * n}, 0.3).slice(0, 0, 2 * n, 2), true);
    check(made({2 * n}, 0.7).slice(0, 0, 2 * n, 2), made({n}, 0.3), true);
  }
}

// More than one batch of what fits the cache (2^19 elements), adapted and not, against the same tensors one at a time.
TEST(steps_of_lars_over_many_tensors) {
  const LarsGroup adapted{0.5, std::nullopt, 0.9, 0.01, 0.02, true, true},
      plain{0.5, std::nullopt, 0.9, 0, 1, false, true};
  const int64_t sizes[] = {300000, 5, 300001, (1 << 19) + 3, 0, 17, 250000, 1};
  LarsTensors together, alone;
  for (int64_t i = 0; i < 8; ++i) {
    for (auto* tensors : {&together, &alone}) {
      tensors->params.push_back(made({sizes[i]}, 0.7 + 0.1 * static_cast<double>(i)));
      tensors->grads.push_back(made({sizes[i]}, 0.3));
      tensors->momenta.push_back(made({sizes[i]}, 0.2));
      tensors->groups.push_back(i % 3 == 0);
    }
  }
  make_lars(at::kCPU)->step(together, {adapted, plain});
  for (size_t i = 0; i < 8; ++i) {
    make_lars(at::kCPU)->step(
        {{alone.params[i]}, {alone.grads[i]}, {alone.momenta[i]}, {0}}, {alone.groups[i] ? plain : adapted});
    CHECK(together.params[i].equal(alone.params[i]) && together.momenta[i].equal(alone.momenta[i]));
  }
}
