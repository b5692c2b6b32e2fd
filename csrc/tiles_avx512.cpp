// tiles.h with AVX512; setup.py compiles this file alone with the flags for it.
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#include "tiles_kernels.inl"

namespace dogo {

template <typename T>
const TileKernels<T>& tile_kernels_avx512() {
  return kKernels<T>;
}

template const TileKernels<float>& tile_kernels_avx512<float>();
template const TileKernels<double>& tile_kernels_avx512<double>();

}  // namespace dogo
