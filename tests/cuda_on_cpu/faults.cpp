// Kernels with a fault each, for what runs them to tell.
#include <exception>
#include <string>

#include "cuda/instructions.h"

namespace vlcore::cuda {
namespace {

constexpr int kThreads = 64;

// Each thread gives what its opposite has left in shared memory.
template <bool kMeets>
void mirror(float* out) {
  __shared__ float given[kThreads];
  given[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kMeets) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = given[kThreads - 1 - threadIdx.x];
}

// Each block gives what the other of its cluster has.
void neighbour(float* out) {
  __shared__ float given;
  if (threadIdx.x == 0) given = static_cast<float>(blockIdx.x);
  cluster_sync();
  out[blockIdx.x * kThreads + threadIdx.x] = *of_block(&given, 1 - cluster_rank());
  cluster_sync();
}

void without_a_lane(float* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = from_lane_xor(1.f, 1);
}

void at_two_places(float* out) {
  float sums[4] = {};
  if (threadIdx.x % 2) {
    out[threadIdx.x] = from_lane_xor(1.f, 1);
  } else {
    multiply_tiles<Float16>(sums, 0, 0, 0, 0, 0, 0);
  }
}

void without_a_warp(float*) {
  if (threadIdx.x < kWarpSize) __syncthreads();
}

void without_a_block(float*) {
  if (cluster_rank() == 0) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

}  // namespace

// What is wrong with a launch of two blocks, if anything is.
extern "C" const char* launch(const char* name, int cluster, int threads, float* out) {
  static std::string error;
  const std::string wanted = name;
  const auto kernel = wanted == "mirror"           ? mirror<true>
                      : wanted == "mirror at once" ? mirror<false>
                      : wanted == "neighbour"      ? neighbour
                      : wanted == "without a lane" ? without_a_lane
                      : wanted == "at two places"  ? at_two_places
                      : wanted == "without a warp" ? without_a_warp
                                                   : without_a_block;
  error.clear();
  try {
    queue(kernel, 2, cluster, threads, nullptr, out);
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  return error.c_str();
}

}  // namespace vlcore::cuda
