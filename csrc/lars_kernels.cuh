// LARS on a GPU: three kernels over all tensors of a step, however many.
//
//   squares  sums of squares of a chunk                   8 bytes a parameter with float32 gradients: w, g
//   ratios   the rates of a tensor from its chunks' sums  small; as a part of `update`, each block would add them up
//   update   momenta and parameters of a chunk            20 bytes: w, g, v read; w, v written
//
// Sums are float32 within a chunk and float64 from there on, without atomics, in an order that shapes and alignment
// decide: equal to the bit in every run with the same memory.
//
// tests/csrc/test_lars_cuda.cpp runs this file on the CPU.
#pragma once

#include "lars_math.h"

namespace dogo {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
// 16 elements a thread: 6,300 blocks for a ResNet-50, a few rounds over a large GPU.  Not measured, there was none.
constexpr int kChunk = 4096;
constexpr int kAhead = 2;  // loads of each array that `update` has under way

// -- a thread's share of a chunk

// N values that travel in one load or store.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <int N, typename T>
__device__ Pack<float, N> load(const T* from) {
  const auto raw = *reinterpret_cast<const Pack<T, N>*>(from);
  Pack<float, N> values;
#pragma unroll
  for (int k = 0; k < N; ++k) values.at[k] = to_float(raw.at[k]);
  return values;
}

template <int N>
__device__ void store(float* to, const Pack<float, N>& values) {
  *reinterpret_cast<Pack<float, N>*>(to) = values;
}

struct Range {
  int begin, end;  // within the chunk
};

template <int N, typename G>
__device__ void add_squares(
    Squares<float>& sum, const float* __restrict__ w, const G* __restrict__ g, float weight_decay, Range range) {
#pragma unroll 4
  for (int i = range.begin + threadIdx.x * N; i < range.end; i += kThreads * N) {
    const auto w_i = load<N>(w + i), g_i = load<N>(g + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float u = decayed(g_i.at[k], w_i.at[k], weight_decay);
      sum.w += w_i.at[k] * w_i.at[k];
      sum.u += u * u;
    }
  }
}

template <int N, bool kMomentum, typename G>
__device__ void update_range(float* w, const G* g, float* v, const LarsEntry& entry, Rates rates, Range range) {
  constexpr int kStep = kThreads * N;
  for (int first = range.begin + threadIdx.x * N; first < range.end; first += kAhead * kStep) {
    // All loads before any store: the compiler moves none over a store, which might have changed what is loaded.
    Pack<float, N> w_i[kAhead]{}, g_i[kAhead]{}, v_i[kAhead]{};
#pragma unroll
    for (int a = 0, i = first; a < kAhead; ++a, i += kStep) {
      if (i >= range.end) break;
      w_i[a] = load<N>(w + i);
      g_i[a] = load<N>(g + i);
      if constexpr (kMomentum) v_i[a] = load<N>(v + i);
    }
#pragma unroll
    for (int a = 0, i = first; a < kAhead; ++a, i += kStep) {
      if (i >= range.end) break;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float u = decayed(g_i[a].at[k], w_i[a].at[k], entry.weight_decay);
        v_i[a].at[k] = entry.momentum * v_i[a].at[k] + rates.in * u;
        w_i[a].at[k] -= rates.out * v_i[a].at[k];
      }
      if constexpr (kMomentum) store(v + i, v_i[a]);
      store(w + i, w_i[a]);
    }
  }
}

// -- a chunk

struct Chunk {
  int64_t offset;  // in its tensor
  Range fours, ones;

  __device__ Chunk(const LarsEntry& entry, int chunk) : offset(int64_t{kChunk} * (chunk - entry.first_chunk)) {
    const int count = static_cast<int>(min(entry.numel - offset, int64_t{kChunk}));
    fours = {0, entry.has(LarsEntry::kAligned) ? count / 4 * 4 : 0};
    ones = {fours.end, count};
  }
};

template <typename G>
__device__ Squares<float> squares_of(const LarsEntry& entry, const Chunk& chunk) {
  const float* w = entry.w + chunk.offset;
  const G* g = static_cast<const G*>(entry.g) + chunk.offset;
  Squares<float> sum;
  add_squares<4>(sum, w, g, entry.weight_decay, chunk.fours);
  add_squares<1>(sum, w, g, entry.weight_decay, chunk.ones);
  return sum;
}

template <bool kMomentum, typename G>
__device__ void update_chunk(const LarsEntry& entry, const Rates& rates, const Chunk& chunk) {
  float* w = entry.w + chunk.offset;
  const G* g = static_cast<const G*>(entry.g) + chunk.offset;
  float* v = kMomentum ? entry.v + chunk.offset : nullptr;
  update_range<4, kMomentum>(w, g, v, entry, rates, chunk.fours);
  update_range<1, kMomentum>(w, g, v, entry, rates, chunk.ones);
}

// The sum over the block, in thread 0.
template <typename T>
__device__ Squares<T> block_sum(Squares<T> sum) {
  __shared__ Squares<T> of_warp[kThreads / kWarp];
  const auto add_lanes = [](Squares<T>& s, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      s.w += __shfl_down_sync(~0u, s.w, step);
      s.u += __shfl_down_sync(~0u, s.u, step);
    }
  };
  add_lanes(sum, kWarp);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    sum = threadIdx.x < kThreads / kWarp ? of_warp[threadIdx.x] : Squares<T>{};
    add_lanes(sum, kWarp);
  }
  return sum;
}

// -- kernels

__global__ void __launch_bounds__(kThreads)
    squares(const LarsEntry* entries, const int32_t* entry_of_chunk, Squares<float>* partials) {
  const LarsEntry entry = entries[entry_of_chunk[blockIdx.x]];
  const Chunk chunk(entry, blockIdx.x);
  const auto sum =
      block_sum(entry.has(LarsEntry::kBfloat16) ? squares_of<uint16_t>(entry, chunk) : squares_of<float>(entry, chunk));
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    ratios(const LarsEntry* entries, const Squares<float>* partials, Rates* found) {
  const LarsEntry entry = entries[blockIdx.x];
  const int64_t chunks = entry.has(LarsEntry::kAdapt) ? (entry.numel + kChunk - 1) / kChunk : 0;
  Squares<double> sum;
  for (int64_t k = threadIdx.x; k < chunks; k += kThreads) {
    sum.w += partials[entry.first_chunk + k].w;
    sum.u += partials[entry.first_chunk + k].u;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) found[blockIdx.x] = rates(entry, sum);
}

__global__ void __launch_bounds__(kThreads)
    update(const LarsEntry* entries, const int32_t* entry_of_chunk, const Rates* rates_of_entry) {
  // From the last chunk to the first: what `squares` read last is what the cache still holds.
  const int number = gridDim.x - 1 - blockIdx.x;
  const int i = entry_of_chunk[number];
  const LarsEntry entry = entries[i];
  const Chunk chunk(entry, number);
  const Rates rates = rates_of_entry[i];
  if (entry.has(LarsEntry::kBfloat16)) {
    entry.v ? update_chunk<true, uint16_t>(entry, rates, chunk) : update_chunk<false, uint16_t>(entry, rates, chunk);
  } else {
    entry.v ? update_chunk<true, float>(entry, rates, chunk) : update_chunk<false, float>(entry, rates, chunk);
  }
}

}  // namespace
}  // namespace dogo
