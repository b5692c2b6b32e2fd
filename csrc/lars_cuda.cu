// LARS on a GPU: three kernels over all tensors of a step, however many.
//
//   squares  sums of squares of a chunk                     8 bytes a parameter with float32 gradients: w, g
//   ratios   the rates of a tensor from its chunks' sums    small; were it part of `update`, each block would add up
//   all
//                                                           of its tensor's sums again
//   update   momenta and parameters of a chunk              20 bytes: w, g, v read; w, v written
//
// Sums are float32 within a chunk and float64 from there on, in an order that shapes alone decide, without atomics:
// equal to the bit in every run.  Nothing waits for the GPU; the table of tensors travels in one copy, when it has
// changed.
#include "lars.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>

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

// -- the host's part

// A table in the GPU's memory, with room for what the kernels hand on.
class Uploaded {
 public:
  // On the current stream, to be used there alone: so does torch's pool know when the memory is free again.
  Uploaded(const LarsTable& table, at::Device device) : map_at_(table.entries.size() * sizeof(LarsEntry)) {
    const size_t map = table.entry_of_chunk.size() * sizeof(int32_t), rates = table.entries.size() * sizeof(Rates);
    rates_at_ = table.adapted_chunks * sizeof(Squares<float>);
    // Fresh memory, never rewritten: torch hands it out again behind the copy that reads it.
    staged_ = at::empty({static_cast<int64_t>(map_at_ + map)}, at::TensorOptions(at::kByte).pinned_memory(true));
    std::memcpy(staged_.data_ptr(), table.entries.data(), map_at_);
    std::memcpy(static_cast<char*>(staged_.data_ptr()) + map_at_, table.entry_of_chunk.data(), map);
    table_ = staged_.to(device, at::kByte, /*non_blocking=*/true);
    sums_ = at::empty({static_cast<int64_t>(rates_at_ + rates)}, at::TensorOptions(at::kByte).device(device));
  }

  const LarsEntry* entries() const { return in<LarsEntry>(table_, 0); }
  const int32_t* entry_of_chunk() const { return in<int32_t>(table_, map_at_); }
  Squares<float>* partials() const { return in<Squares<float>>(sums_, 0); }
  Rates* rates() const { return in<Rates>(sums_, rates_at_); }

 private:
  template <typename T>
  static T* in(const at::Tensor& memory, size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(memory.data_ptr()) + offset);
  }

  size_t map_at_, rates_at_;
  at::Tensor staged_, table_, sums_;
};

void launch(const LarsTable& table, const Uploaded& on_gpu, cudaStream_t stream) {
  if (table.adapted_chunks > 0) {
    squares<<<table.adapted_chunks, kThreads, 0, stream>>>(
        on_gpu.entries(), on_gpu.entry_of_chunk(), on_gpu.partials());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const auto entries = static_cast<unsigned>(table.entries.size());
  ratios<<<entries, kThreads, 0, stream>>>(on_gpu.entries(), on_gpu.partials(), on_gpu.rates());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto chunks = static_cast<unsigned>(table.entry_of_chunk.size());
  update<<<chunks, kThreads, 0, stream>>>(on_gpu.entries(), on_gpu.entry_of_chunk(), on_gpu.rates());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

class LarsCuda : public Lars {
 public:
  void step(const LarsTensors& tensors, const std::vector<LarsGroup>& groups) override {
    if (tensors.params.empty()) return;
    const c10::cuda::CUDAGuard guard(tensors.params[0].device());
    LarsTable table(tensors, groups, kChunk);
    if (table.entries.empty()) return;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
      // Memory for the host takes calls that only a relaxed capture allows.  Each replay copies the table again, from
      // where it stands now; it stays there as long as the optimizer.
      const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
      captured_.push_back(std::make_unique<Uploaded>(table, guard.current_device()));
      launch(table, *captured_.back(), stream);
    } else {
      if (!last_ || stream != last_->stream || !last_->holds(table)) {
        last_.reset();  // its memory may serve again
        last_ = std::make_unique<Last>(
            Last{stream, Uploaded(table, guard.current_device()), table.entries, table.entry_of_chunk});
      }
      launch(table, last_->on_gpu, stream);
    }
    table.write_back();
  }

 private:
  struct Last {
    c10::cuda::CUDAStream stream;
    Uploaded on_gpu;
    std::vector<LarsEntry> entries;
    std::vector<int32_t> entry_of_chunk;

    bool holds(const LarsTable& table) const {
      return entry_of_chunk == table.entry_of_chunk && entries.size() == table.entries.size()
             && std::memcmp(entries.data(), table.entries.data(), entries.size() * sizeof(LarsEntry)) == 0;
    }
  };

  std::unique_ptr<Last> last_;
  std::vector<std::unique_ptr<Uploaded>> captured_;
};

}  // namespace

std::unique_ptr<Lars> make_lars_cuda() { return std::make_unique<LarsCuda>(); }

}  // namespace dogo
