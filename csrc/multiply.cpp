#include "multiply.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

namespace dogo {
namespace {

template <typename T>
void blas(const T* A, const T* B, T* C, int64_t rows, int64_t cols, int64_t inner, bool add) {
  const at::AutoDispatchBelowADInplaceOrView guard;  // a tile is no place for autograd's bookkeeping
  const auto matrix = [](const T* data, int64_t height, int64_t width) {
    return at::from_blob(const_cast<T*>(data), {height, width}, c10::CppTypeToScalarType<T>::value);
  };
  auto c = matrix(C, rows, cols);
  at::addmm_out(c, c, matrix(A, rows, inner), matrix(B, inner, cols), add ? 1 : 0);
}

}  // namespace

template <>
void multiply<double>(
    const double* A, const double* B, double* C, int64_t rows, int64_t cols, int64_t inner, bool add) {
  blas(A, B, C, rows, cols, inner, add);
}

// float32 goes to oneDNN's kernels, which ATen falls back from to BLAS where the machine has no AVX-512: 209 against
// 106 GFLOP/s at 256 x 256 x 128 on one core of an AMD EPYC (Zen 5), for which MKL has no AVX-512 code.
// oneDNN keeps what it compiled for each shape and thread: tiles have at most eight sides, but every new width D costs
// some 0.7 MB.
template <>
void multiply<float>(const float* A, const float* B, float* C, int64_t rows, int64_t cols, int64_t inner, bool add) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  at::native::cpublas::brgemm(rows, cols, inner, inner, cols, cols, add, A, B, C, /*is_vnni=*/false);
#else
  blas(A, B, C, rows, cols, inner, add);
#endif
}

}  // namespace dogo
