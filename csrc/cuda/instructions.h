#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

// What kernels need of a GPU besides C++, and all that tests put something of a CPU in place of.
namespace vlcore::cuda {

constexpr int kWarpSize = 32;

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// 16 bytes that are read once and written by nobody meanwhile: they leave the first-level cache to others.
__device__ inline uint4 load_once(const void* address) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address));
  return words;
}

// (word & mask) | others, in one instruction, which the compiler makes two of.
__device__ inline uint32_t among(uint32_t word, uint32_t mask, uint32_t others) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(others));
  return result;
}

// a - b for each half of a word.
template <typename T>
__device__ inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  uint32_t difference;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // As one fused operation, which every architecture has.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  } else {
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  }
  return difference;
}

// sums (16, 8) += a (16, 16) b (16, 8), spread over a warp. Of lane 4 g + t: sums holds rows g and g + 8 of columns 2 t
// and 2 t + 1; a the pairs (row g, inner 2 t), (g + 8, 2 t), (g, 2 t + 8) and (g + 8, 2 t + 8); b the pairs (inner 2 t,
// column g) and (2 t + 8, g).
template <typename T>
__device__ inline void multiply_tiles(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                      uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ inline float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }

// Where another block of the cluster has what this one has at `place` of its shared memory.
template <typename T>
__device__ inline const T* of_block(T* place, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(place, rank);
}
#endif

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Queues a kernel of `blocks` blocks, each `cluster` of them on neighbouring multiprocessors; 0 asks for no clusters,
// which come with compute capability 9.0.
template <typename Given>
void queue(void (*kernel)(Given), int blocks, int cluster, int threads, void* stream, const Given& given) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 0;
  check(cudaLaunchKernelEx(&config, kernel, given));
}

}  // namespace vlcore::cuda
