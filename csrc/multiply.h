// C = A B or C += A B of row-major matrices in one thread, through what torch multiplies with.
#pragma once

#include <cstdint>

namespace dogo {

// A [rows, inner], B [inner, cols], C [rows, cols], each without gaps.
template <typename T>
void multiply(const T* A, const T* B, T* C, int64_t rows, int64_t cols, int64_t inner, bool add);

}  // namespace dogo
