#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "blocks.h"

// What stands here in place of csrc/cuda/instructions.h, so that the kernels above it run on a CPU as they are written:
// the same functions, and what nvcc adds to C++.
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// A block's threads share an OS thread, and no other block has it meanwhile.
#define __shared__ static thread_local

namespace vlcore::cuda {

constexpr int kWarpSize = 32;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

using Float16 = _Float16;
struct BFloat16 {
  uint16_t bits;
};

inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline Float16 __ushort_as_half(uint16_t bits) { return same_bits<Float16>(bits); }
inline float __half2float(Float16 x) { return x; }
inline Float16 __float2half_rn(float x) { return static_cast<Float16>(x); }
inline float __bfloat162float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline BFloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using std::min;
inline void sincospif(float turns, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(turns * M_PI)), *cosine = static_cast<float>(std::cos(turns * M_PI));
}

// Of the 8 bytes of two words, those that the low four digits of `chosen` name.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t chosen) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = chosen >> (4 * i) & 15u;
    if (digit > 7) throw std::logic_error("__byte_perm copies signs, which is not done here");
    result |= static_cast<uint32_t>(bytes >> (8 * digit) & 255u) << (8 * i);
  }
  return result;
}

inline uint4 load_once(const void* address) { return *static_cast<const uint4*>(address); }

inline uint32_t among(uint32_t word, uint32_t mask, uint32_t others) { return (word & mask) | others; }

// The low or the high half of a word, as one of its numbers.
template <typename T>
float half_of(uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __bfloat162float({bits});
  } else {
    return __half2float(__ushort_as_half(bits));
  }
}

template <typename T>
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  uint32_t difference = 0;
  for (int half = 0; half < 2; ++half) {
    // Of two such numbers float32 holds the difference of nearly all, and of all that kernels subtract.
    const float exact = half_of<T>(a, half) - half_of<T>(b, half);
    uint16_t bits;
    if constexpr (std::is_same_v<T, BFloat16>) {
      bits = __float2bfloat16_rn(exact).bits;
    } else {
      bits = same_bits<uint16_t>(__float2half_rn(exact));
    }
    difference |= uint32_t{bits} << (16 * half);
  }
  return difference;
}

template <typename T>
void multiply_tiles(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands mine{{a0, a1, a2, a3}, {b0, b1}};
  const Operands* lanes = of_all_lanes(mine);
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = 0;
    for (int inner = 0; inner < 16; ++inner) {
      const int pair = inner % 8 / 2, far = inner / 8;
      const uint32_t a = lanes[4 * (row % 8) + pair].a[row / 8 + 2 * far], b = lanes[4 * column + pair].b[far];
      sum += static_cast<double>(half_of<T>(a, inner % 2)) * half_of<T>(b, inner % 2);
    }
    sums[i] += static_cast<float>(sum);
  }
}

inline float from_lane_xor(float x, int mask) { return of_all_lanes(x)[lane() ^ mask]; }

template <typename Given>
void queue(void (*kernel)(Given), int blocks, int cluster, int threads, void*, const Given& given) {
  run_blocks(blocks, std::max(cluster, 1), threads, [&] { kernel(given); });
}

}  // namespace vlcore::cuda
