// The kernels of pixels.h, in loops that compilers turn into vectors; included by pixels_<instruction set>.cpp.
#include <cstring>

#include "lanes.h"
#include "pixels.h"

namespace dogo {
namespace {

// -- transposing

// Words side by side, in the vectors of the compiler.
template <int64_t kLanes>
using Words __attribute__((vector_size(8 * kLanes))) = uint64_t;

// Exchanges bits `mask` of b with those `shift` higher of a.
template <typename T>
inline void exchange(T& a, T& b, int shift, uint64_t mask) {
  const T changed = ((a >> shift) ^ b) & mask;
  b ^= changed;
  a ^= changed << shift;
}

// Blocks of 8 x 8 bytes side by side, as many as T has words: transposed by halves, quarters and eighths.
template <typename T>
inline void transpose_blocks(T (&rows)[8]) {
  for (int k = 0; k < 4; ++k) exchange(rows[k], rows[k + 4], 32, 0x00000000FFFFFFFF);
  for (int k = 0; k < 4; ++k) exchange(rows[k + (k & 2)], rows[k + (k & 2) + 2], 16, 0x0000FFFF0000FFFF);
  for (int k = 0; k < 8; k += 2) exchange(rows[k], rows[k + 1], 8, 0x00FF00FF00FF00FF);
}

// 8 rows of 8 kLanes bytes become as many columns of 8; `row(k)` is where a row begins, `column(i)` where a column
// goes.
template <int64_t kLanes, typename Row, typename Column>
inline void turn(const Row& row, const Column& column) {
  Words<kLanes> words[8];
  for (int64_t k = 0; k < 8; ++k) std::memcpy(&words[k], row(k), 8 * kLanes);
  transpose_blocks(words);
  for (int64_t j = 0; j < kLanes; ++j) {
    for (int64_t k = 0; k < 8; ++k) {
      const uint64_t bytes = words[k][j];
      std::memcpy(column(8 * j + k), &bytes, 8);
    }
  }
}

void band(const uint8_t* rows_first, int64_t pitch, int64_t rows, int64_t bytes, uint8_t* columns_first) {
  const int64_t whole = bytes / 64 * 64;
  uint8_t rest[kBand][64] = {};
  for (int64_t y = 0; y < kBand; ++y) {
    std::memcpy(rest[y], rows_first + (y < rows ? y : rows - 1) * pitch + whole, bytes - whole);
  }
  for (int64_t y = 0; y < kBand; y += 8) {
    for (int64_t x = 0; x < bytes; x += 64) {
      const auto row = [&](int64_t k) {
        return x == whole ? rest[y + k] : rows_first + (y + k < rows ? y + k : rows - 1) * pitch + x;
      };
      turn<8>(row, [&](int64_t i) { return columns_first + (x + i) * kBand + y; });
    }
  }
}

void unband(const uint8_t* columns_first, int64_t columns, uint8_t* planes, int64_t pitch, int64_t plane) {
  for (int64_t x = 0; x < columns; x += 8) {
    for (int64_t c = 0; c < 3; ++c) {
      const auto column = [&](int64_t k) { return columns_first + ((x + k) * 3 + c) * kBand; };
      turn<kBand / 8>(column, [&](int64_t y) { return planes + c * plane + y * pitch + x; });
    }
  }
}

void transpose(const uint8_t* plane, int64_t P, uint8_t* transposed) {
  for (int64_t y = 0; y < P; y += 8) {
    for (int64_t x = 0; x < P; x += kPixelAlign) {
      const auto row = [&](int64_t k) { return plane + (y + k) * P + x; };
      turn<kPixelAlign / 8>(row, [&](int64_t i) { return transposed + (x + i) * P + y; });
    }
  }
}

// -- sums of rows

constexpr int64_t kBlock = kPixelAlign / kLanes;  // vectors side by side: enough to hide what each waits for

// Of thousands of weights, each rounded, white may come out a level too high.
inline Ints rounded(Ints sum) { return smaller(sum >> kWeightBits, Ints{} + 255); }

inline uint8_t weighed(const uint8_t* rows, int64_t pitch, const int32_t* weights, int64_t count) {
  int32_t sum = 1 << (kWeightBits - 1);
  for (int64_t k = 0; k < count; ++k) sum += weights[k] * rows[k * pitch];
  return static_cast<uint8_t>(sum >> kWeightBits < 255 ? sum >> kWeightBits : 255);
}

void weigh(const uint8_t* rows, int64_t pitch, const int32_t* weights, int64_t count, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + kPixelAlign <= n; i += kPixelAlign) {
    Ints sums[kBlock];
    for (auto& sum : sums) sum = Ints{} + (1 << (kWeightBits - 1));
    for (int64_t k = 0; k < count; ++k) {
      const uint8_t* row = rows + k * pitch + i;
      for (int64_t b = 0; b < kBlock; ++b) sums[b] += load(row + b * kLanes) * weights[k];
    }
    for (int64_t b = 0; b < kBlock; ++b) store(rounded(sums[b]), out + i + b * kLanes);
  }
  for (; i < n; ++i) out[i] = weighed(rows + i, pitch, weights, count);
}

// -- blur

inline Ints boxed(Ints inside, Ints edge, const Box& box) {
  typedef uint32_t Unsigned __attribute__((vector_size(4 * kLanes)));
  const auto sum = reinterpret_cast<Unsigned>(inside) * box.inside + reinterpret_cast<Unsigned>(edge) * box.edge;
  return reinterpret_cast<Ints>((sum + (1u << (kBoxBits - 1))) >> kBoxBits);
}

// One pass over a column of vectors; `row(y)` is the y-th, and `done` takes what becomes of each, in order.
template <typename Row, typename Done>
inline void blur_column(const Row& row, int64_t S, const Box& box, const Done& done) {
  const int64_t last = S - 1, radius = box.radius, below = radius < last ? radius : last;
  const auto clamped = [&](int64_t y) { return row(y < 0 ? 0 : y < last ? y : last); };
  Ints inside = row(0) * static_cast<int32_t>(radius + 1) + row(last) * static_cast<int32_t>(radius - below);
  for (int64_t y = 1; y <= below; ++y) inside += row(y);
  const auto step = [&](int64_t y, Ints before, Ints first, Ints after) {
    done(y, boxed(inside, before + after, box));
    inside += after - first;
  };
  const auto near_edge = [&](int64_t y) {
    step(y, clamped(y - radius - 1), clamped(y - radius), clamped(y + radius + 1));
  };
  int64_t y = 0;
  for (; y <= radius && y < S; ++y) near_edge(y);
  for (; y + radius < last; ++y) step(y, row(y - radius - 1), row(y - radius), row(y + radius + 1));
  for (; y < S; ++y) near_edge(y);
}

// All passes over a column before the next: what is between them stays in the nearest cache, and is not packed.
void blur(const uint8_t* plane, int64_t S, int64_t P, const Box& given, int32_t* scratch, uint8_t* out) {
  const Box box = given;
  Ints *once = reinterpret_cast<Ints*>(scratch), *twice = once + S;
  for (int64_t x = 0; x < P; x += kLanes) {
    blur_column([&](int64_t y) { return load(plane + y * P + x); }, S, box, [&](int64_t y, Ints v) { once[y] = v; });
    blur_column([&](int64_t y) { return once[y]; }, S, box, [&](int64_t y, Ints v) { twice[y] = v; });
    blur_column([&](int64_t y) { return twice[y]; }, S, box, [&](int64_t y, Ints v) { store(v, out + y * P + x); });
  }
}

// -- colours

inline Ints blended(Floats low, Floats v, float factor) { return clipped(ints(low + factor * (v - low))); }

// Whole numbers below 2^24: exact.
inline Ints luminance_of(Floats r, Floats g, Floats b) {
  return ints((19595 * r + 38470 * g + 7471 * b + 32768) * (1.f / 65536));
}

void blend(uint8_t* v, int64_t n, float low, float factor) {
  const Floats lows = Floats{} + low;
  for (int64_t i = 0; i < n; i += kLanes) store(blended(lows, floats(load(v + i)), factor), v + i);
}

int64_t luminance(const uint8_t* planes, int64_t S, int64_t P) {
  int64_t total = 0;
  for (int64_t y = 0; y < S; ++y, planes += P) {
    const uint8_t *r = planes, *g = r + P * P, *b = g + P * P;
    Ints sums{};
    int64_t x = 0;
    for (; x + kLanes <= S; x += kLanes)
      sums += luminance_of(floats(load(r + x)), floats(load(g + x)), floats(load(b + x)));
    if (x < S) {
      const Ints rest = luminance_of(floats(load(r + x)), floats(load(g + x)), floats(load(b + x)));
      for (int64_t i = 0; i < S - x; ++i) total += rest[i];
    }
    for (int64_t i = 0; i < kLanes; ++i) total += sums[i];
  }
  return total;
}

void saturate(uint8_t* planes, int64_t plane, float factor) {
  uint8_t *red = planes, *green = red + plane, *blue = green + plane;
  for (int64_t i = 0; i < plane; i += kLanes) {
    const Floats r = floats(load(red + i)), g = floats(load(green + i)), b = floats(load(blue + i));
    const Floats grey = floats(luminance_of(r, g, b));
    store(blended(grey, r, factor), red + i);
    store(blended(grey, g, factor), green + i);
    store(blended(grey, b, factor), blue + i);
  }
}

// A channel: `share` steps of 255 taken off the value.
inline Ints shaded(Floats value, Floats step, Ints share) {
  return ints((value + 0.5f) - step * floats(clipped(share)));
}

// To hue, saturation and value in bytes, and back.  Divisions by `range` and 6 are rounded one by one: where a hue is a
// whole number of steps, it depends on them what it is truncated to.  All 2^24 colours and all 2^24 hues are Pillow's.
void hue(uint8_t* planes, int64_t plane, int32_t turn) {
  uint8_t *red = planes, *green = red + plane, *blue = green + plane;
  const Ints zero{}, one = zero + 1;
  for (int64_t i = 0; i < plane; i += kLanes) {
    const Ints r = load(red + i), g = load(green + i), b = load(blue + i);
    const Ints value = larger(r, larger(g, b)), range = value - smaller(r, smaller(g, b));
    // Sixths of a turn: whole ones by which channel is largest, the rest by where the middle one stands.
    const Ints ahead = r == value ? g - b : g == value ? b - r : r - g;
    const Ints base = r == value ? zero : g == value ? one + 1 : one + 3;
    const Ints sign = ahead < 0 ? -one : one;
    const Floats middle = floats(range - larger(ahead, -ahead)) / floats(larger(range, one));
    const Floats sixth = (floats(base + sign) - floats(sign) * middle) / 6;
    const Ints steps = ints((sixth + (sixth < 0 ? Floats{} + 1 : Floats{})) * 255);
    const Floats saturation = floats(ints(floats(255 * range) / floats(larger(value, one))));
    const Ints turned = 6 * ((steps + turn) & 255);
    const Floats step = floats(value) * saturation * (1.f / 65025);
    store(shaded(floats(value), step, smaller(turned - 255, 1275 - turned)), red + i);
    store(shaded(floats(value), step, larger(255 - turned, turned - 765)), green + i);
    store(shaded(floats(value), step, larger(765 - turned, turned - 1275)), blue + i);
  }
}

// -- last steps

void solarize(uint8_t* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) v[i] = v[i] < 128 ? v[i] : 255 - v[i];
}

void normalize(
    const uint8_t* planes, int64_t S, int64_t P, const float* scale, const float* shift, float* __restrict__ out) {
  const float scale_r = scale[0], scale_g = scale[1], scale_b = scale[2];
  const float shift_r = shift[0], shift_g = shift[1], shift_b = shift[2];
  for (int64_t y = 0; y < S; ++y, planes += P, out += 3 * S) {
    const uint8_t *r = planes, *g = r + P * P, *b = g + P * P;
    for (int64_t x = 0; x < S; ++x) {
      out[3 * x] = scale_r * r[x] + shift_r;
      out[3 * x + 1] = scale_g * g[x] + shift_g;
      out[3 * x + 2] = scale_b * b[x] + shift_b;
    }
  }
}

constexpr PixelKernels kPixelKernels{band,      unband,   weigh, transpose, blur,     blend,
                                     luminance, saturate, hue,   solarize,  normalize};

}  // namespace
}  // namespace dogo
