#pragma once
#include <cstddef>
#include <functional>

// Blocks of threads as a GPU runs them, on a CPU. The threads of a block take turns, and a turn lasts until others have
// to be waited for: a warp is far ahead of another, and in half of the blocks the last one is ahead of the first.
// Throws std::runtime_error where a GPU would wait for ever, or give what is not defined.
namespace vlcore::cuda {

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

// Runs `thread` in each thread of the blocks, and waits for all.
void run_blocks(int blocks, int cluster, int threads, const std::function<void()>& thread);

// The rest is for those threads. All threads of a block meet in:
void __syncthreads();
// All threads of a cluster meet in:
void cluster_sync();
int cluster_size();
int cluster_rank();
const void* of_block(const void* place, int rank);
int lane();
// All threads of a warp meet, and each is given what all have; until it calls this again.
constexpr size_t kMaxGiven = 32;
const void* of_all_lanes(const void* mine, size_t bytes);

template <typename T>
const T* of_block(T* place, int rank) {
  return static_cast<const T*>(of_block(static_cast<const void*>(place), rank));
}

template <typename T>
const T* of_all_lanes(const T& mine) {
  static_assert(sizeof(T) <= kMaxGiven);
  return static_cast<const T*>(of_all_lanes(&mine, sizeof(T)));
}

}  // namespace vlcore::cuda
