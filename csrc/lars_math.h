// LARS, what its CPU and CUDA code share: the table of tensors and the arithmetic.  The formulas stand in
// kernels/lars.py.
//
// Legend
//   w, g, v  parameter, gradient, momentum buffer of one tensor      wd  weight decay
//   u        g + wd w                                                 |.| l2 norm of the whole tensor
//   chunk    consecutive elements of one tensor, the unit of work; chunks are counted over all tensors
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DOGO_ANYWHERE __host__ __device__ inline
#else
#define DOGO_ANYWHERE inline
#endif

namespace dogo {

// One tensor of a step; plain bytes, which travel to the GPU as they are.
struct LarsEntry {
  float* w;
  const void* g;        // float32, or bfloat16 with kBfloat16
  float* v;             // null where momentum is 0
  const float* lr_ptr;  // where not null, read in place of `lr`
  int64_t numel;
  int32_t first_chunk;
  uint32_t flags;
  float lr, momentum, weight_decay, eta;

  static constexpr uint32_t kBfloat16 = 1, kAligned = 2, kAdapt = 4, kLrInMomentum = 8;
  DOGO_ANYWHERE bool has(uint32_t flag) const { return flags & flag; }
};

// Sums of squares over a tensor, or over a part of it.
template <typename T>
struct Squares {
  T w = 0, u = 0;
};

// A step in numbers, the norms known:  v = momentum v + in u,  w -= out v.
struct Rates {
  float in, out;
};

// eta |w| / |u|, or 1 where either is zero.  NaN goes through, and with it through every entry: no norm that is not a
// number becomes a ratio of 1, which would be a step of a thousand times the usual length.
DOGO_ANYWHERE double trust_ratio(const Squares<double>& sum, double eta) {
  if (sum.w == 0 || sum.u == 0) return 1;
  return eta * (std::sqrt(sum.w) / std::sqrt(sum.u));
}

DOGO_ANYWHERE Rates rates(const LarsEntry& entry, const Squares<double>& sum) {
  const double ratio = entry.has(LarsEntry::kAdapt) ? trust_ratio(sum, entry.eta) : 1;
  const double lr = entry.lr_ptr ? *entry.lr_ptr : entry.lr;
  if (entry.has(LarsEntry::kLrInMomentum)) return {static_cast<float>(lr * ratio), 1};
  return {static_cast<float>(ratio), static_cast<float>(lr)};
}

DOGO_ANYWHERE float decayed(float g, float w, float weight_decay) { return g + weight_decay * w; }

DOGO_ANYWHERE float to_float(float g) { return g; }

// bfloat16 is the upper half of a float32.
DOGO_ANYWHERE float to_float(uint16_t g) {
  const uint32_t bits = static_cast<uint32_t>(g) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace dogo
