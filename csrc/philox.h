// Uniform numbers from a counter: Philox4x64-10 (Salmon et al. 2011), as NumPy's bit generator of that name has them.
#pragma once

#include <array>
#include <cstdint>

namespace dogo {

// out [n][count] in [0, 1), for each of n counters the first numbers of a generator of its own: of the 256 bits that
// are counted up, the lowest 64 begin at 0, the next are `counters[i]`, then `stream`, then 0.
void philox_uniforms(
    std::array<uint64_t, 2> key, uint64_t stream, const int64_t* counters, int64_t n, int64_t count, double* out);

}  // namespace dogo
