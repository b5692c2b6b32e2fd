// The GPU's LARS kernels, run on the CPU (cuda_on_cpu.h), against a loop in double: odd sizes, misaligned memory.
#include "cuda_on_cpu.h"

// After the macros: the kernels' own text.
#include <cstring>
#include <random>

#include "check.h"
#include "lars_kernels.cuh"

using namespace dogo;

namespace {

struct Tensors {
  std::vector<float> w, v;
  std::vector<uint16_t> halves;  // gradients in bfloat16
  std::vector<float> g;          // the same, and what others hold
  LarsEntry entry{};
};

float gradient(const Tensors& t, int64_t i) {
  return t.entry.has(LarsEntry::kBfloat16) ? to_float(t.halves[i]) : t.g[i];
}

// n elements and four more around them, which no kernel may touch.
Tensors made(int64_t n, unsigned kind) {
  std::mt19937 generator(kind);
  std::normal_distribution<float> normal;
  Tensors t;
  t.w.resize(n + 4), t.v.resize(n + 4), t.g.resize(n + 4), t.halves.resize(n + 4);
  for (int64_t i = 0; i < n + 4; ++i) {
    t.w[i] = normal(generator), t.v[i] = normal(generator), t.g[i] = 3 * normal(generator);
    uint32_t bits;
    std::memcpy(&bits, &t.g[i], sizeof bits);
    t.halves[i] = static_cast<uint16_t>(bits >> 16);
  }
  return t;
}

// Its entry, once it lies where it stays: memory from `shift` on, settings by the bits of `kind`.
void point(Tensors& t, int64_t n, int64_t shift, unsigned kind, const float* rate) {
  auto& e = t.entry;
  e.flags = (kind & 1 ? LarsEntry::kBfloat16 : 0) | (kind & 2 ? LarsEntry::kLrInMomentum : 0);
  e.w = t.w.data() + shift, e.v = kind & 4 ? t.v.data() + shift : nullptr;
  e.g = kind & 1 ? static_cast<const void*>(t.halves.data() + shift) : t.g.data() + shift;
  const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (aligned(e.w, 16) && aligned(e.v, 16) && aligned(e.g, kind & 1 ? 8 : 16)) e.flags |= LarsEntry::kAligned;
  e.lr_ptr = kind & 8 ? rate : nullptr;
  e.numel = n;
  e.lr = 0.21f, e.momentum = 0.9f, e.weight_decay = 0.05f, e.eta = 0.02f;
}

void check(const Tensors& before, const Tensors& after, int64_t shift) {
  const auto& e = before.entry;
  const double wd = e.weight_decay;
  double ww = 0, uu = 0;
  for (int64_t i = shift; i < shift + e.numel; ++i) {
    const double u = gradient(before, i) + wd * before.w[i];
    ww += static_cast<double>(before.w[i]) * before.w[i];
    uu += u * u;
  }
  const double ratio = e.has(LarsEntry::kAdapt) ? e.eta * std::sqrt(ww / uu) : 1, lr = e.lr_ptr ? *e.lr_ptr : e.lr;
  const bool inside = e.has(LarsEntry::kLrInMomentum);
  for (int64_t i = 0; i < static_cast<int64_t>(before.w.size()); ++i) {
    const bool ours = i >= shift && i < shift + e.numel;
    const double u = gradient(before, i) + wd * before.w[i];
    const double v = (e.v ? static_cast<double>(e.momentum) * before.v[i] : 0) + (inside ? lr : 1) * ratio * u;
    CHECK_NEAR(after.w[i], ours ? before.w[i] - (inside ? 1 : lr) * v : before.w[i], 1e-5, ours ? 1e-5 : 0);
    CHECK_NEAR(after.v[i], ours && e.v ? v : before.v[i], 1e-5, ours ? 1e-5 : 0);
  }
}

}  // namespace

TEST(gpu_kernels_of_lars) {
  static const float rate = 0.37f;
  const int64_t sizes[] = {1, 3, 4, 255, 257, 1025, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk + 1021};
  std::vector<Tensors> tensors;
  std::vector<int64_t> shifts;
  for (unsigned k = 0; k < std::size(sizes); ++k) {
    shifts.push_back(k % 3 == 0 ? 0 : k % 4);
    tensors.push_back(made(sizes[k], 7 * k + 2));
  }
  for (unsigned k = 0; k < std::size(sizes); ++k) point(tensors[k], sizes[k], shifts[k], 7 * k + 2, &rate);
  const auto before = tensors;
  std::vector<LarsEntry> entries;
  std::vector<int32_t> entry_of_chunk;
  unsigned adapted_chunks = 0;
  const size_t adapted = 6;  // those that adapt stand first
  for (size_t k = 0; k < tensors.size(); ++k) {
    auto& e = tensors[k].entry;
    e.first_chunk = static_cast<int32_t>(entry_of_chunk.size());
    if (k < adapted) e.flags |= LarsEntry::kAdapt;
    entry_of_chunk.insert(entry_of_chunk.end(), (e.numel + kChunk - 1) / kChunk, static_cast<int32_t>(k));
    if (k < adapted) adapted_chunks = static_cast<unsigned>(entry_of_chunk.size());
    entries.push_back(e);
  }
  std::vector<Squares<float>> partials(adapted_chunks);
  std::vector<Rates> found(entries.size());
  const auto launch = [](size_t blocks, const auto& kernel) {
    cuda_on_cpu::launch(static_cast<unsigned>(blocks), kThreads, kernel);
  };
  launch(adapted_chunks, [&] { squares(entries.data(), entry_of_chunk.data(), partials.data()); });
  launch(entries.size(), [&] { ratios(entries.data(), partials.data(), found.data()); });
  launch(entry_of_chunk.size(), [&] { update(entries.data(), entry_of_chunk.data(), found.data()); });
  for (size_t k = 0; k < tensors.size(); ++k) {
    auto start = before[k];
    start.entry.flags = tensors[k].entry.flags;
    check(start, tensors[k], shifts[k]);
  }
}
