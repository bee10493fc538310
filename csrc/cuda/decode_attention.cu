// Decoding attention in one launch: a cluster of blocks shares the cached tokens of a few heads that read the same
// keys, each block attends over its part of them, and the first one joins the parts through their shared memories.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/device.h"
#include "rotary_frequencies.h"

namespace vlcore::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxHeadDim = 128;
// A cluster may have 8 blocks on every GPU that has clusters; more blocks than this in all keep none of them busier.
constexpr int kMaxSplits = 8;
constexpr int kEnoughBlocks = 256;
// Tokens of each lane that are on their way.
constexpr int kDepth = 4;
constexpr float kLog2E = 1.44269504f;
constexpr double kPi = 3.14159265358979323846;

struct Step {
  const void *q, *k, *v;
  void *key_cache, *value_cache;
  const void* lengths;
  void* out;
  int64_t row_stride, token_stride;
  int heads, kv_heads;
  bool long_lengths;
  // What a score is multiplied by to be an exponent of 2.
  float scale;
  // Of each pair of a head, what a position is multiplied by to be its angle.
  float frequencies[kMaxHeadDim / 2];
};

// exp2(x - largest), where nothing has been seen yet if both are -inf.
[[maybe_unused]] __device__ inline float weight_of(float x, float largest) {
  return exp2f(x - (largest == -INFINITY ? 0.f : largest));
}

// One value of a head's output and of its softmax, taken together of parts that were each relative to a maximum of
// their own. part(i, largest, sum, value) gives those of a part.
struct Joined {
  float largest = -INFINITY, sum = 0.f, value = 0.f;

  template <typename Part>
  __device__ Joined(int parts, Part part) {
    float part_largest, part_sum, part_value;
    for (int i = 0; i < parts; ++i) {
      part(i, part_largest, part_sum, part_value);
      largest = fmaxf(largest, part_largest);
    }
    for (int i = 0; i < parts; ++i) {
      part(i, part_largest, part_sum, part_value);
      const float weight = weight_of(part_largest, largest);
      sum += part_sum * weight;
      value += part_value * weight;
    }
  }
};

// The softmax of some tokens so far, in each group of lanes that holds a token's head, for the heads of a block.
template <typename T, int kHeadDim, int kHeads>
struct Attention {
  static constexpr int kElements = 16 / sizeof(T), kLanes = kHeadDim / kElements, kGroups = kWarpSize / kLanes;

  float q[kHeads][kElements];
  float largest[kHeads], sum[kHeads], values[kHeads][kElements];

  __device__ void begin(const float (*queries)[kHeadDim], int first) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      largest[head] = -INFINITY, sum[head] = 0.f;
#pragma unroll
      for (int i = 0; i < kElements; ++i) q[head][i] = queries[head][first + i], values[head][i] = 0.f;
    }
  }

  __device__ void add(const uint4 (&keys)[kDepth], const uint4 (&token_values)[kDepth], const bool (&used)[kDepth]) {
    float scores[kDepth][kHeads];
#pragma unroll
    for (int token = 0; token < kDepth; ++token) {
      float key[kElements];
      to_floats<T>(keys[token], key);
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        float score = 0.f;
#pragma unroll
        for (int i = 0; i < kElements; ++i) score += q[head][i] * key[i];
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) score += from_lane_xor(score, mask);
        scores[token][head] = used[token] ? score : -INFINITY;
      }
    }
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      float now = largest[head];
#pragma unroll
      for (int token = 0; token < kDepth; ++token) now = fmaxf(now, scores[token][head]);
      const float kept = weight_of(largest[head], now);
      largest[head] = now;
      sum[head] *= kept;
#pragma unroll
      for (int i = 0; i < kElements; ++i) values[head][i] *= kept;
#pragma unroll
      for (int token = 0; token < kDepth; ++token) {
        scores[token][head] = weight_of(scores[token][head], now);
        sum[head] += scores[token][head];
      }
    }
#pragma unroll
    for (int token = 0; token < kDepth; ++token) {
      float value[kElements];
      to_floats<T>(token_values[token], value);
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) values[head][i] += scores[token][head] * value[i];
      }
    }
  }

  // Leaves in all groups of a warp what they hold together.
  __device__ void join_groups() {
#pragma unroll
    for (int mask = kLanes; mask < kWarpSize; mask *= 2) {
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        const float other = from_lane_xor(largest[head], mask), both = fmaxf(largest[head], other);
        const float mine = weight_of(largest[head], both), its = weight_of(other, both);
        largest[head] = both;
        sum[head] = sum[head] * mine + from_lane_xor(sum[head], mask) * its;
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          values[head][i] = values[head][i] * mine + from_lane_xor(values[head][i], mask) * its;
        }
      }
    }
  }
};

// Turns the pairs of `heads` heads: turned(head, i) takes what becomes of element i.
template <typename T, int kHeadDim, typename Turned>
__device__ void rotate(const T* x, int heads, const Step& step, int64_t position, Turned turned) {
  constexpr int kPairs = kHeadDim / 2;
  for (int i = threadIdx.x; i < heads * kPairs; i += kThreads) {
    const int head = i / kPairs, pair = i % kPairs;
    // An angle is rounded as in every other kernel, and then whole turns are taken off in float64.
    const double turns = static_cast<double>(static_cast<float>(position) * step.frequencies[pair]) * (1 / (2 * kPi));
    float sine, cosine;
    sincospif(2.f * static_cast<float>(turns - rint(turns)), &sine, &cosine);
    const float first = to_float(x[head * kHeadDim + pair]), second = to_float(x[head * kHeadDim + pair + kPairs]);
    turned(head, pair, first * cosine - second * sine);
    turned(head, pair + kPairs, second * cosine + first * sine);
  }
}

template <typename T, int kHeadDim, int kHeads>
__global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ Step step) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Heads = Attention<T, kHeadDim, kHeads>;
  __shared__ float queries[kHeads][kHeadDim], new_key[kHeadDim], new_value[kHeadDim], new_scores[kHeads];
  __shared__ float warp_values[kWarps][kHeads][kHeadDim], warp_softmax[kWarps][kHeads][2];
  __shared__ float block_values[kHeads][kHeadDim], block_softmax[kHeads][2];

  const int splits = cluster_size(), split = cluster_rank(), unit = blockIdx.x / splits;
  const int units = step.heads / kHeads, first_head = unit % units * kHeads;
  const int heads_of_a_key = step.heads / step.kv_heads, kv_head = first_head / heads_of_a_key;
  const int64_t row = unit / units;
  const int64_t length = step.long_lengths ? static_cast<const int64_t*>(step.lengths)[row]
                                           : static_cast<const int32_t*>(step.lengths)[row];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int group = warp * Heads::kGroups + lane / Heads::kLanes, first = lane % Heads::kLanes * Heads::kElements;

  // The cached tokens of this block, one group of lanes after another.
  const int64_t share = (length + splits - 1) / splits;
  const int64_t begin = split * share, end = min(begin + share, length);
  const int64_t cache_head = row * step.row_stride + static_cast<int64_t>(kv_head) * kHeadDim;
  const T* const key_cache = static_cast<const T*>(step.key_cache) + cache_head + first;
  const T* const value_cache = static_cast<const T*>(step.value_cache) + cache_head + first;
  constexpr int kStride = kWarps * Heads::kGroups;
  uint4 keys[kDepth], values[kDepth];
  const auto load = [&](const T* cache, int64_t token, uint4(&into)[kDepth]) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i, token += kStride) {
      into[i] = make_uint4(0, 0, 0, 0);
      if (token < end) into[i] = load_once(cache + token * step.token_stride);
    }
  };
  load(key_cache, begin + group, keys);
  load(value_cache, begin + group, values);

  const T* const q = static_cast<const T*>(step.q) + (row * step.heads + first_head) * kHeadDim;
  rotate<T, kHeadDim>(q, kHeads, step, length, [&](int head, int i, float x) { queries[head][i] = x * step.scale; });
  if (split == 0) {
    // The new token goes into the caches, and is attended to from here: blocks that read the caches may be ahead.
    const bool writes = first_head % heads_of_a_key == 0;
    const int64_t given = (row * step.kv_heads + kv_head) * kHeadDim;
    const int64_t place = cache_head + length * step.token_stride;
    rotate<T, kHeadDim>(static_cast<const T*>(step.k) + given, 1, step, length, [&](int, int i, float x) {
      const T key = rounded<T>(x);
      new_key[i] = to_float(key);
      if (writes) static_cast<T*>(step.key_cache)[place + i] = key;
    });
    for (int i = threadIdx.x; i < kHeadDim; i += kThreads) {
      const T value = static_cast<const T*>(step.v)[given + i];
      new_value[i] = to_float(value);
      if (writes) static_cast<T*>(step.value_cache)[place + i] = value;
    }
  }
  __syncthreads();
  if (split == 0 && warp < kHeads) {
    float score = 0.f;
#pragma unroll
    for (int i = lane; i < kHeadDim; i += kWarpSize) score += queries[warp][i] * new_key[i];
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) score += from_lane_xor(score, mask);
    if (lane == 0) new_scores[warp] = score;
  }

  Heads attention;
  attention.begin(queries, first);
  for (int64_t token = begin + group; token - group < end; token += kDepth * kStride) {
    bool used[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) used[i] = token + i * kStride < end;
    attention.add(keys, values, used);
    load(key_cache, token + kDepth * kStride, keys);
    load(value_cache, token + kDepth * kStride, values);
  }
  attention.join_groups();
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    if (lane >= Heads::kLanes) break;
#pragma unroll
    for (int i = 0; i < Heads::kElements; ++i) warp_values[warp][head][first + i] = attention.values[head][i];
    if (lane == 0) {
      warp_softmax[warp][head][0] = attention.largest[head], warp_softmax[warp][head][1] = attention.sum[head];
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kHeads * kHeadDim; i += kThreads) {
    const int head = i / kHeadDim, element = i % kHeadDim;
    const Joined joined(kWarps, [&](int w, float& largest, float& sum, float& value) {
      largest = warp_softmax[w][head][0], sum = warp_softmax[w][head][1], value = warp_values[w][head][element];
    });
    block_values[head][element] = joined.value;
    if (element == 0) block_softmax[head][0] = joined.largest, block_softmax[head][1] = joined.sum;
  }
  cluster_sync();
  if (split == 0) {
    for (int i = threadIdx.x; i < kHeads * kHeadDim; i += kThreads) {
      const int head = i / kHeadDim, element = i % kHeadDim;
      // The new token is a part of its own, behind those of the blocks.
      const Joined joined(splits + 1, [&](int block, float& largest, float& sum, float& value) {
        if (block == splits) {
          largest = new_scores[head], sum = 1.f, value = new_value[element];
        } else {
          const float* softmax = of_block(&block_softmax[head][0], block);
          largest = softmax[0], sum = softmax[1], value = *of_block(&block_values[head][element], block);
        }
      });
      static_cast<T*>(step.out)[(row * step.heads + first_head + head) * kHeadDim + element] =
          rounded<T>(joined.value / joined.sum);
    }
  }
  // No block ends, and its memory with it, while it may be read.
  cluster_sync();
#endif
}

template <typename T, int kHeadDim, int kHeads>
void launch(const Step& step, int64_t batch, void* stream) {
  const int64_t units = batch * (step.heads / kHeads);
  int splits = kMaxSplits;
  while (splits > 1 && units * splits > kEnoughBlocks) splits /= 2;
  queue(attend<T, kHeadDim, kHeads>, static_cast<int>(units * splits), splits, kThreads, stream, step);
}

// More heads at once would not fit the registers: other blocks read their keys again, from the second-level cache.
template <typename T, int kHeadDim>
void launch_heads(const Step& step, int64_t batch, void* stream) {
  const int together = step.heads / step.kv_heads;
  if (together % 4 == 0) return launch<T, kHeadDim, 4>(step, batch, stream);
  if (together % 2 == 0) return launch<T, kHeadDim, 2>(step, batch, stream);
  launch<T, kHeadDim, 1>(step, batch, stream);
}

}  // namespace

void decode_attention_forward(const void* q, const void* k, const void* v, void* key_cache, void* value_cache,
                              const void* lengths, void* out, int64_t batch, int64_t row_stride, int64_t token_stride,
                              int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t length_bytes, double theta,
                              float scale, Queue queue) {
  if (head_dim != 64 && head_dim != 128) {
    throw std::invalid_argument("a head of " + std::to_string(head_dim) + " is neither 64 nor 128");
  }
  if (kv_heads <= 0 || heads % kv_heads) {
    throw std::invalid_argument(std::to_string(heads) + " heads do not share " + std::to_string(kv_heads));
  }
  if (length_bytes != 4 && length_bytes != 8) {
    throw std::invalid_argument("lengths of " + std::to_string(length_bytes) + " bytes are neither int32 nor int64");
  }
  check_aligned(key_cache, value_cache);
  if (batch == 0 || heads == 0) return;
  Step step{q, k, v, key_cache, value_cache, lengths, out, row_stride, token_stride};
  step.heads = static_cast<int>(heads), step.kv_heads = static_cast<int>(kv_heads);
  step.long_lengths = length_bytes == 8;
  step.scale = scale * kLog2E;
  const std::vector<float> frequencies = rotary_frequencies(theta, head_dim);
  std::copy(frequencies.begin(), frequencies.end(), step.frequencies);
  for_type(queue.dtype, [&](auto type) {
    using T = decltype(type);
    if (row_stride * sizeof(T) % 16 || token_stride * sizeof(T) % 16) {
      throw std::invalid_argument("the tokens of a cache are not at multiples of 16 bytes");
    }
    head_dim == 64 ? launch_heads<T, 64>(step, batch, queue.stream) : launch_heads<T, 128>(step, batch, queue.stream);
  });
}

}  // namespace vlcore::cuda
