// pixels.h with AVX512; setup.py compiles this file alone with the flags for it.
#include "pixels_kernels.inl"

namespace dogo {

const PixelKernels& pixel_kernels_avx512() { return kPixelKernels; }

}  // namespace dogo
