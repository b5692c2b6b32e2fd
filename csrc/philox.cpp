#include "philox.h"

namespace dogo {
namespace {

using Block = std::array<uint64_t, 4>;

// The constants of the paper.
constexpr uint64_t kMultiply[2] = {0xD2E7470EE14C6C93, 0xCA5A826395121157};
constexpr uint64_t kWeyl[2] = {0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B};
constexpr int kRounds = 10;

Block philox(Block counter, std::array<uint64_t, 2> key) {
  for (int round = 0; round < kRounds; ++round) {
    const auto first = static_cast<unsigned __int128>(kMultiply[0]) * counter[0];
    const auto second = static_cast<unsigned __int128>(kMultiply[1]) * counter[2];
    counter = {
        static_cast<uint64_t>(second >> 64) ^ counter[1] ^ key[0], static_cast<uint64_t>(second),
        static_cast<uint64_t>(first >> 64) ^ counter[3] ^ key[1], static_cast<uint64_t>(first)};
    key[0] += kWeyl[0];
    key[1] += kWeyl[1];
  }
  return counter;
}

}  // namespace

void philox_uniforms(
    std::array<uint64_t, 2> key, uint64_t stream, const int64_t* counters, int64_t n, int64_t count, double* out) {
  for (int64_t i = 0; i < n; ++i, out += count) {
    for (int64_t k = 0; k < count; k += 4) {
      // Counted up before it is used.
      const Block block =
          philox({static_cast<uint64_t>(k / 4 + 1), static_cast<uint64_t>(counters[i]), stream, 0}, key);
      for (int64_t j = 0; j < 4 && k + j < count; ++j) {
        out[k + j] = static_cast<double>(block[j] >> 11) * (1.0 / 9007199254740992.0);  // 53 bits
      }
    }
  }
}

}  // namespace dogo
