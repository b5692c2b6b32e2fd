// pixels.h with AVX2; setup.py compiles this file alone with the flags for it.
#include "pixels_kernels.inl"

namespace dogo {

const PixelKernels& pixel_kernels_avx2() { return kPixelKernels; }

}  // namespace dogo
