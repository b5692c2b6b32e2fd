// Vectors of the compiler's own that hold one pixel a lane, and the ways in and out of memory, where each is a byte.
//
// Compilers widen a loop over bytes by way of 16 bits, in more instructions than the arithmetic takes: half the time of
// a resize.  So loads and stores are spelled out where there is an instruction for them, and nothing else is.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dogo {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Ints ints(Floats v) { return __builtin_convertvector(v, Ints); }  // towards zero
inline Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

#if defined(__AVX512F__)

inline Ints load(const uint8_t* p) {
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Of values from 0 to 255.
inline void store(Ints v, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
}

#elif defined(__AVX2__)

inline Ints load(const uint8_t* p) {
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline void store(Ints v, uint8_t* p) {
  const __m256i all = reinterpret_cast<__m256i>(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

#elif defined(__SSE2__)

inline Ints load(const uint8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  const __m128i none = _mm_setzero_si128(), words = _mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), none);
  return reinterpret_cast<Ints>(_mm_unpacklo_epi16(words, none));
}

inline void store(Ints v, uint8_t* p) {
  const __m128i all = reinterpret_cast<__m128i>(v), words = _mm_packs_epi32(all, all);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  std::memcpy(p, &bytes, 4);
}

#else

inline Ints load(const uint8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }

inline void store(Ints v, uint8_t* p) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
}

#endif

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Ints clipped(Ints v) { return smaller(larger(v, Ints{}), Ints{} + 255); }

}  // namespace
}  // namespace dogo
