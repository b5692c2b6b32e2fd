// tiles.h for any machine, and the choice between what was compiled.
#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT
#include "tiles_kernels.inl"

#include <ATen/Version.h>

#include <stdexcept>
#include <string>

namespace dogo {

#if defined(__x86_64__)
template <typename T>
const TileKernels<T>& tile_kernels_avx2();
template <typename T>
const TileKernels<T>& tile_kernels_avx512();
#endif

template <typename T>
const TileKernels<T>& tile_kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return tile_kernels_avx512<T>();
  if (capability == "AVX2") return tile_kernels_avx2<T>();
#endif
  return kKernels<T>;
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();

}  // namespace dogo
