// Just enough of CUDA's language to run one kernel after another on the CPU: a thread for each of a block's, one block
// at a time, so that static variables are shared memory.  Slow, and blind to races between blocks.
#pragma once

#include <algorithm>
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __restrict__
#define __launch_bounds__(threads)
#define __shared__ static

struct CudaIndex {
  unsigned x = 0;
};

inline thread_local CudaIndex threadIdx, blockIdx;
inline CudaIndex gridDim;

using std::min;

namespace cuda_on_cpu {

constexpr int kWarp = 32;

inline std::unique_ptr<std::barrier<>> of_block;
inline std::vector<std::unique_ptr<std::barrier<>>> of_warp;
inline double exchanged[1024];

template <typename Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    of_block = std::make_unique<std::barrier<>>(threads);
    of_warp.clear();
    for (unsigned w = 0; w < threads / kWarp; ++w) of_warp.push_back(std::make_unique<std::barrier<>>(kWarp));
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; ++t) {
      pool.emplace_back([&kernel, b, t] {
        blockIdx.x = b;
        threadIdx.x = t;
        kernel();
        of_block->arrive_and_drop();
        of_warp[t / kWarp]->arrive_and_drop();
      });
    }
    for (auto& thread : pool) thread.join();
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::of_block->arrive_and_wait(); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int lanes) {
  using namespace cuda_on_cpu;
  const unsigned thread = threadIdx.x, lane = thread % kWarp;
  exchanged[thread] = value;
  of_warp[thread / kWarp]->arrive_and_wait();
  const T found = lane + lanes < kWarp ? static_cast<T>(exchanged[thread + lanes]) : value;
  of_warp[thread / kWarp]->arrive_and_wait();
  return found;
}
