// One LARS step over any number of tensors; the formulas stand in kernels/lars.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "lars_math.h"

namespace dogo {

// The settings that a parameter group's tensors share.
struct LarsGroup {
  double lr;
  std::optional<at::Tensor> lr_tensor;  // 0-d float32 on the parameters' device, read there in place of `lr`
  double momentum, weight_decay, eta;
  bool adapt, lr_in_momentum;
};

// Tensors of one device.
struct LarsTensors {
  std::vector<at::Tensor> params;   // float32
  std::vector<at::Tensor> grads;    // float32 or bfloat16
  std::vector<at::Tensor> momenta;  // float32; undefined where the group's momentum is 0
  std::vector<int64_t> groups;
};

class Lars {
 public:
  virtual ~Lars() = default;

  // Updates params and momenta in place.
  virtual void step(const LarsTensors& tensors, const std::vector<LarsGroup>& groups) = 0;
};

std::unique_ptr<Lars> make_lars(at::Device device);
#if DOGO_CUDA
std::unique_ptr<Lars> make_lars_cuda();
#endif

// The table of one step: those that adapt first, each tensor without gaps and all three of it in one order of elements.
struct LarsTable {
  std::vector<LarsEntry> entries;
  std::vector<int32_t> entry_of_chunk;
  int32_t adapted_chunks = 0;

  LarsTable(const LarsTensors& tensors, const std::vector<LarsGroup>& groups, int64_t chunk_numel);

  // To be called behind the step: gives the copies, of tensors that do have gaps, back to them.
  void write_back() const;

 private:
  void add(const LarsTensors& tensors, size_t i, const LarsGroup& group, int64_t chunk_numel);
  at::Tensor in_order_of(const at::Tensor& order, const at::Tensor& t, bool written);

  std::vector<at::Tensor> copies_;                          // of gradients; alive until the step is enqueued
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;  // original and copy
};

}  // namespace dogo
