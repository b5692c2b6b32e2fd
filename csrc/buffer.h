// Arrays from torch's allocator: aligned for vectors, and seen by its memory profiler.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <type_traits>

namespace dogo {

// `size` values, zero at first.
template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : bytes_(at::zeros({size * static_cast<int64_t>(sizeof(T))}, at::kByte)),
        data_(reinterpret_cast<T*>(bytes_.mutable_data_ptr<uint8_t>())),
        size_(size) {}
  Buffer(Buffer&& other) noexcept = default;
  Buffer& operator=(Buffer&& other) noexcept = default;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  bool empty() const { return size_ == 0; }

 private:
  at::Tensor bytes_;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace dogo
