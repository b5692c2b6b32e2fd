// pixels.h for any machine, and the choice between what was compiled.
#include "pixels_kernels.inl"

#include <ATen/Version.h>

#include <string>

namespace dogo {

#if defined(__x86_64__)
const PixelKernels& pixel_kernels_avx2();
const PixelKernels& pixel_kernels_avx512();
#endif

const PixelKernels& pixel_kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return pixel_kernels_avx512();
  if (capability == "AVX2") return pixel_kernels_avx2();
#endif
  return kPixelKernels;
}

}  // namespace dogo
