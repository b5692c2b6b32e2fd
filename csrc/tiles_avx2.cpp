// tiles.h with AVX2; setup.py compiles this file alone with the flags for it.
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#include "tiles_kernels.inl"

namespace dogo {

template <typename T>
const TileKernels<T>& tile_kernels_avx2() {
  return kKernels<T>;
}

template const TileKernels<float>& tile_kernels_avx2<float>();
template const TileKernels<double>& tile_kernels_avx2<double>();

}  // namespace dogo
