// Compiles the kernels of one file for every level. A file cpu/<op>.cpp reads:
//
//   #ifndef VLCORE_LEVEL
//   #define VLCORE_FILE "cpu/<op>.cpp"
//   #define VLCORE_MULTIPLIES_TILES   (only where the kernels gain by the last level, of whole tiles)
//   #include "cpu/for_each_level.h"
//   ... functions of kernels.h, which call VLCORE_RUN(target, kernel, arguments...)
//   #else
//   namespace vlcore::VLCORE_LEVEL { template <typename T> void kernel(arguments) ... }
//   #endif
//
// It is included again here, below, with VLCORE_LEVEL the name of the level, the compiler set to the level's
// instructions, and cpu/simd.h and cpu/tile.h already read at that level. Standard headers go above the #ifndef: read
// at a level, their functions would end up with its instructions in what other machines run.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/bfloat16.h"

#define VLCORE_LEVEL generic
#define VLCORE_LANES 4
#include "cpu/simd.h"
#include "cpu/tile.h"
#include VLCORE_FILE
#undef VLCORE_LEVEL
#undef VLCORE_LANES

#if defined(VLCORE_X86_LEVELS)

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define VLCORE_LEVEL avx2
#define VLCORE_LANES 8
#include "cpu/simd.h"
#include "cpu/tile.h"
#include VLCORE_FILE
#undef VLCORE_LEVEL
#undef VLCORE_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define VLCORE_LEVEL avx512
#define VLCORE_LANES 16
#include "cpu/simd.h"
#include "cpu/tile.h"
#include VLCORE_FILE
#undef VLCORE_LEVEL
#undef VLCORE_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512,avx512vnni,avx512bf16")
#define VLCORE_LEVEL avx512_bf16
#define VLCORE_LANES 16
#define VLCORE_BF16_DOT
#include "cpu/simd.h"
#include "cpu/tile.h"
#include VLCORE_FILE
#undef VLCORE_LEVEL
#undef VLCORE_LANES
#undef VLCORE_BF16_DOT
#pragma GCC pop_options

#if defined(VLCORE_X86_TILES) && defined(VLCORE_MULTIPLIES_TILES)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512,avx512vnni,avx512bf16")
#define VLCORE_LEVEL amx
#define VLCORE_LANES 16
#define VLCORE_BF16_DOT
#define VLCORE_AMX
#include "cpu/simd.h"
#include "cpu/tile.h"
#include VLCORE_FILE
#undef VLCORE_LEVEL
#undef VLCORE_LANES
#undef VLCORE_BF16_DOT
#undef VLCORE_AMX
#pragma GCC pop_options
#endif

#endif

#define VLCORE_RUN_AT(level_name, target, kernel, ...) \
  (target.dtype == DType::float32 ? level_name::kernel<float>(__VA_ARGS__) : level_name::kernel<bfloat16>(__VA_ARGS__))
#if defined(VLCORE_X86_LEVELS)
#if defined(VLCORE_X86_TILES) && defined(VLCORE_MULTIPLIES_TILES)
// Tiles are of bfloat16.
#define VLCORE_RUN_AT_BEST(target, kernel, ...)                  \
  (target.level == Level::amx && target.dtype == DType::bfloat16 \
       ? amx::kernel<bfloat16>(__VA_ARGS__)                      \
       : VLCORE_RUN_AT(avx512_bf16, target, kernel, __VA_ARGS__))
#else
#define VLCORE_RUN_AT_BEST(target, kernel, ...) VLCORE_RUN_AT(avx512_bf16, target, kernel, __VA_ARGS__)
#endif
#define VLCORE_RUN(target, kernel, ...)                                                    \
  (target.level >= Level::avx512_bf16 ? VLCORE_RUN_AT_BEST(target, kernel, __VA_ARGS__)    \
   : target.level == Level::avx512    ? VLCORE_RUN_AT(avx512, target, kernel, __VA_ARGS__) \
   : target.level == Level::avx2      ? VLCORE_RUN_AT(avx2, target, kernel, __VA_ARGS__)   \
                                      : VLCORE_RUN_AT(generic, target, kernel, __VA_ARGS__))
#else
#define VLCORE_RUN(target, kernel, ...) VLCORE_RUN_AT(generic, target, kernel, __VA_ARGS__)
#endif
