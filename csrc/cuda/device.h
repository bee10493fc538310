#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/instructions.h"
#include "cuda_kernels.h"

// What kernels of 16-byte words share.
namespace vlcore::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(Float16 x) { return __half2float(x); }

template <typename T>
__device__ inline T rounded(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// The elements of 16 bytes.
template <typename T>
__device__ inline void to_floats(uint4 words, float (&x)[16 / sizeof(T)]) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(word[i] & 0xffffu)));
      x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word[i] >> 16)));
    }
  }
}

template <typename... Pointers>
void check_aligned(Pointers... pointers) {
  if (((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...)) return;
  throw std::invalid_argument("a tensor does not begin at a multiple of 16 bytes");
}

// Calls launch(T()) with the type of a dtype.
template <typename Launch>
void for_type(DType dtype, Launch launch) {
  switch (dtype) {
    case DType::float32:
      return launch(float());
    case DType::bfloat16:
      return launch(BFloat16());
    case DType::float16:
      return launch(Float16());
  }
  throw std::invalid_argument("there is no dtype " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace vlcore::cuda
