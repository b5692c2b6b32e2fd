// LARS on a GPU, the host's part: the table of tensors travels in one copy, when it has changed, and three launches
// follow.  Nothing waits for the GPU.
#include "lars.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>

#include "lars_kernels.cuh"

namespace dogo {
namespace {

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
