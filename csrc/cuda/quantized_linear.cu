// A linear layer of a few rows with a weight of integers: the reading of the weight, 16 bytes a lane at a time, several
// of them on their way. The integers themselves are multiplied, exactly, and each group's sum by its scale.
#include "cuda/device.h"

namespace vlcore::cuda {
namespace {

constexpr int kMaxRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
// A block has 16 outputs, and its warps take turns at steps of 64 bytes of their rows: lane 4 g + t reads bytes 16 t of
// outputs g and g + 8.
constexpr int kOutputs = 16;
constexpr int kStepBytes = 64;
// Steps of a warp that are on their way.
constexpr int kDepth = 4;

struct Layer {
  const void* x;
  const uint8_t* values;
  const float* scales;
  const void* bias;
  void* y;
  int rows, outputs, inputs, row_bytes, groups;
  // inputs >> group_shift is the group.
  int group_shift;
};

// Outputs past the last are the last again.
__device__ inline const float* scales_of(const Layer& layer, int output) {
  return layer.scales + static_cast<int64_t>(min(output, layer.outputs - 1)) * layer.groups;
}

// 8 integers, in pairs that tensor cores multiply. In 8 bits, of the words 2 i and 2 i + 1, the pairs are neighbours.
// In 4 bits, of the word i, they are inputs (0, 4), (1, 5), (2, 6) and (3, 7).
template <typename T, int kBits>
__device__ inline void unpack(const uint32_t (&words)[4], int i, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    if constexpr (kBits == 4) {
      // The half as the last bits of 128, or of 1024; then 8 more than that is taken off.
      constexpr uint32_t kMagic = std::is_same_v<T, BFloat16> ? 0x43004300u : 0x64006400u;
      pairs[pair] = subtract_pairs<T>(among(words[i] >> (4 * pair), 0x000f000fu, kMagic), kMagic + 0x00080008u);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      // A bfloat16 has room for 7 bits: 128 plus the low ones, less 128, or less 256 where the sign is set.
      const uint32_t bytes = __byte_perm(words[2 * i + pair / 2], 0, pair % 2 ? 0x4342 : 0x4140);
      pairs[pair] = subtract_pairs<T>(among(bytes, 0x007f007fu, 0x43004300u), among(bytes, 0x00800080u, 0x43004300u));
    } else {
      const uint32_t shifted = words[2 * i + pair / 2] ^ 0x80808080u;
      pairs[pair] =
          subtract_pairs<T>(__byte_perm(shifted, 0x64646464u, pair % 2 ? 0x4342 : 0x4140), 0x64006400u + 0x00800080u);
    }
  }
}

// 8 neighbouring inputs of a row, in the pairs of `unpack`.
template <int kBits>
__device__ inline void pair_up(uint4 x, uint32_t (&pairs)[4]) {
  if constexpr (kBits == 8) {
    pairs[0] = x.x, pairs[1] = x.y, pairs[2] = x.z, pairs[3] = x.w;
  } else {
    pairs[0] = __byte_perm(x.x, x.z, 0x5410), pairs[1] = __byte_perm(x.x, x.z, 0x7632);
    pairs[2] = __byte_perm(x.y, x.w, 0x5410), pairs[3] = __byte_perm(x.y, x.w, 0x7632);
  }
}

// A warp's sums in bfloat16 or float16, by tensor cores. They add up what the four lanes of an output multiply; where
// those are at kSplit different groups, each group has columns of its own: column row * kSplit + group.
template <typename T, int kBits_, int kSplit, int kTiles>
struct TensorCores {
  static constexpr int kBits = kBits_, kSums = kSplit, kRows = 8 * kTiles / kSplit, kScales = kSplit == 1 ? 2 : 4;
  static constexpr bool kAhead = kTiles == 1;
  static constexpr int kLaneInputs = 128 / kBits, kStepInputs = 4 * kLaneInputs;

  const Layer& layer;
  const int t;
  // Whether this lane's group is that of its column.
  const bool own;
  const T* x[kTiles];
  const float* scales[2];
  float totals[kTiles][4] = {};

  __device__ TensorCores(const Layer& layer, int first_row, int output, int lane)
      : layer(layer), t(lane % 4), own(t * kSplit / 4 == lane / 4 % kSplit) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      // Columns past the last row are nobody's: whatever they hold stays there.
      const int row = min(first_row + (8 * tile + lane / 4) / kSplit, layer.rows - 1);
      x[tile] = static_cast<const T*>(layer.x) + static_cast<int64_t>(row) * layer.inputs;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) scales[half] = scales_of(layer, output + 8 * half);
  }

  // Of both outputs in a step, each in the groups of this lane's columns.
  __device__ float scale(int step, int i) const {
    const int split = kSplit == 1 ? 0 : (2 * t + i % 2) % kSplit;
    const int group = (step * kStepInputs + split * (kStepInputs / kSplit)) >> layer.group_shift;
    return scales[i * 2 / kScales][min(group, layer.groups - 1)];
  }

  __device__ void add(const uint32_t (&words)[2][4], const float (&ahead)[kScales], int step) {
    // Past the last input the integers are zeros, and the first inputs again are what they are multiplied by.
    int input = step * kStepInputs + t * kLaneInputs;
    if (input >= layer.inputs) input = 0;
    float sums[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kLaneInputs / 8; ++i) {
      uint32_t a[2][4], b[4];
      unpack<T, kBits>(words[0], i, a[0]);
      unpack<T, kBits>(words[1], i, a[1]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const auto eight = reinterpret_cast<const uint4*>(x[tile] + input) + i;
        pair_up<kBits>(kSplit == 1 || own ? *eight : make_uint4(0, 0, 0, 0), b);
        multiply_tiles<T>(sums[tile], a[0][0], a[1][0], a[0][1], a[1][1], b[0], b[1]);
        multiply_tiles<T>(sums[tile], a[0][2], a[1][2], a[0][3], a[1][3], b[2], b[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int which = i * kScales / 4;
      const float factor = kAhead ? ahead[which] : scale(step, which);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) totals[tile][i] += sums[tile][i] * factor;
    }
  }

  // To sums (kRows, kSums, kOutputs).
  __device__ void write(float* sums, int lane) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(8 * tile + 2 * t + i % 2) * kOutputs + lane / 4 + 8 * (i / 2)] = totals[tile][i];
      }
    }
  }
};

// The same in float32, by fused multiply-adds; a lane has sums of its own.
template <int kBits_, int kRows_>
struct Floats {
  static constexpr int kBits = kBits_, kSums = 1, kRows = kRows_, kScales = 2;
  static constexpr bool kAhead = kRows == 1;
  static constexpr int kLaneInputs = 128 / kBits, kStepInputs = 4 * kLaneInputs;

  const Layer& layer;
  const int first_row, t;
  const float* scales[2];
  float totals[2][kRows] = {};

  __device__ Floats(const Layer& layer, int first_row, int output, int lane)
      : layer(layer), first_row(first_row), t(lane % 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) scales[half] = scales_of(layer, output + 8 * half);
  }

  // An integer as the last bits of 2^23, and that taken off again.
  __device__ static float integer(const uint32_t (&words)[4], int i) {
    if constexpr (kBits == 8) {
      const uint32_t byte = __byte_perm(words[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7440 | (i % 4));
      return __uint_as_float(byte) - 8388736.f;
    } else {
      return __uint_as_float(((words[i / 8] >> (4 * (i % 8))) & 15u) | 0x4b000000u) - 8388616.f;
    }
  }

  __device__ float scale(int step, int half) const {
    const int group = (step * kStepInputs + t * kLaneInputs) >> layer.group_shift;
    return scales[half][min(group, layer.groups - 1)];
  }

  __device__ void add(const uint32_t (&words)[2][4], const float (&ahead)[kScales], int step) {
    const int input = step * kStepInputs + t * kLaneInputs;
    if (input >= layer.inputs) return;
    const float* x = static_cast<const float*>(layer.x) + static_cast<int64_t>(first_row) * layer.inputs + input;
    float sums[2][kRows] = {};
#pragma unroll
    for (int i = 0; i < kLaneInputs; i += 4) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (first_row + row >= layer.rows) break;
        const auto four = *reinterpret_cast<const float4*>(x + static_cast<int64_t>(row) * layer.inputs + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sums[half][row] += four.x * integer(words[half], i) + four.y * integer(words[half], i + 1) +
                             four.z * integer(words[half], i + 2) + four.w * integer(words[half], i + 3);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = kAhead ? ahead[half] : scale(step, half);
#pragma unroll
      for (int i = 0; i < kRows; ++i) totals[half][i] += sums[half][i] * factor;
    }
  }

  __device__ void write(float* sums, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float sum = totals[half][row];
        sum += from_lane_xor(sum, 1);
        sum += from_lane_xor(sum, 2);
        if (t == 0) sums[row * kOutputs + lane / 4 + 8 * half] = sum;
      }
    }
  }
};

// Blocks are numbered so that those that read the same weights for other rows run side by side. Two share a
// multiprocessor where scales are on their way too; elsewhere (0) the compiler takes the registers that it needs.
template <typename T, typename Products>
__global__ void __launch_bounds__(kThreads, Products::kAhead ? 2 : 0) multiply_rows(const Layer layer) {
  __shared__ float sums[kWarps][Products::kRows * Products::kSums * kOutputs];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int parts = (layer.rows + Products::kRows - 1) / Products::kRows;
  const int first_row = blockIdx.x % parts * Products::kRows, first = blockIdx.x / parts * kOutputs;
  const int output = first + lane / 4, steps = (layer.row_bytes + kStepBytes - 1) / kStepBytes;

  const uint8_t* values[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = min(output + 8 * half, layer.outputs - 1);
    values[half] = layer.values + row * layer.row_bytes + lane % 4 * 16;
  }
  Products products(layer, first_row, output, lane);
  // Scales are on their way with the weights that they belong to, unless more rows need the registers.
  uint32_t words[kDepth][2][4];
  float scales[kDepth][Products::kScales];
  const auto load = [&](int slot, int step) {
    const bool inside = step * kStepBytes + lane % 4 * 16 < layer.row_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr uint32_t kZeros = Products::kBits == 4 ? 0x88888888u : 0u;
      uint4 loaded = make_uint4(kZeros, kZeros, kZeros, kZeros);
      if (inside) loaded = load_once(values[half] + step * kStepBytes);
      words[slot][half][0] = loaded.x, words[slot][half][1] = loaded.y;
      words[slot][half][2] = loaded.z, words[slot][half][3] = loaded.w;
    }
    if constexpr (Products::kAhead) {
#pragma unroll
      for (int i = 0; i < Products::kScales; ++i) scales[slot][i] = products.scale(step, i);
    }
  };

#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) load(slot, warp + slot * kWarps);
  for (int step = warp; step < steps; step += kDepth * kWarps) {
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) {
      const int current = step + slot * kWarps;
      if (current < steps) products.add(words[slot], scales[slot], current);
      load(slot, current + kDepth * kWarps);
    }
  }
  products.write(sums[warp], lane);
  __syncthreads();

  const int row = threadIdx.x / kOutputs, column = threadIdx.x % kOutputs;
  if (row >= Products::kRows || first_row + row >= layer.rows || first + column >= layer.outputs) return;
  float sum = layer.bias == nullptr ? 0.f : to_float(static_cast<const T*>(layer.bias)[first + column]);
#pragma unroll
  for (int i = 0; i < Products::kSums; ++i) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][(row * Products::kSums + i) * kOutputs + column];
  }
  static_cast<T*>(layer.y)[static_cast<int64_t>(first_row + row) * layer.outputs + first + column] = rounded<T>(sum);
}

template <typename T, typename Products>
void launch(const Layer& layer, void* stream) {
  const int parts = (layer.rows + Products::kRows - 1) / Products::kRows;
  const int blocks = (layer.outputs + kOutputs - 1) / kOutputs * parts;
  queue(multiply_rows<T, Products>, blocks, 0, kThreads, stream, layer);
}

template <typename T, int kBits, int kSplit>
void launch_split(const Layer& layer, void* stream) {
  // Where groups are split the rows of a tile are few, and then one more instance of tiles is worth it.
  constexpr int kMore = kSplit == 1 ? 2 : 4;
  const bool fits = layer.rows <= 8 / kSplit;
  fits ? launch<T, TensorCores<T, kBits, kSplit, 1>>(layer, stream)
       : launch<T, TensorCores<T, kBits, kSplit, kMore>>(layer, stream);
}

template <typename T, int kBits>
void launch_bits(const Layer& layer, void* stream) {
  if constexpr (std::is_same_v<T, float>) {
    return layer.rows == 1 ? launch<T, Floats<kBits, 1>>(layer, stream) : launch<T, Floats<kBits, 4>>(layer, stream);
  } else {
    const int group = 1 << layer.group_shift;
    if (kBits == 4 && group == 32) return launch_split<T, kBits, kBits == 4 ? 4 : 2>(layer, stream);
    if (group < 512 / kBits) return launch_split<T, kBits, 2>(layer, stream);
    launch_split<T, kBits, 1>(layer, stream);
  }
}

// The logarithm of the size of a group; of the whole row, one that no input reaches.
int group_shift(int64_t inputs, int64_t groups) {
  if (groups == 1) return 30;
  for (int shift = 5; shift <= 7; ++shift) {
    if (groups << shift == inputs) return shift;
  }
  throw std::invalid_argument(std::to_string(groups) + " groups of " + std::to_string(inputs) +
                              " inputs are not of 32, 64 or 128");
}

}  // namespace

void quantized_linear_forward(const void* x, const void* values, const float* scales, const void* bias, void* y,
                              int64_t rows, int64_t outputs, int64_t inputs, int64_t groups, int bits, Queue queue) {
  if (bits != 8 && bits != 4) throw std::invalid_argument(std::to_string(bits) + " bits are neither 8 nor 4");
  if (rows > kMaxRows) throw std::invalid_argument(std::to_string(rows) + " rows are more than 16");
  if (inputs % (128 / bits)) {
    throw std::invalid_argument("a row of " + std::to_string(inputs) + " inputs is no multiple of 16 bytes");
  }
  check_aligned(x, values);
  const int shift = group_shift(inputs, groups);
  if (rows == 0 || outputs == 0) return;
  const Layer layer{x,
                    static_cast<const uint8_t*>(values),
                    scales,
                    bias,
                    y,
                    static_cast<int>(rows),
                    static_cast<int>(outputs),
                    static_cast<int>(inputs),
                    static_cast<int>(inputs * bits / 8),
                    static_cast<int>(groups),
                    shift};
  for_type(queue.dtype, [&](auto type) {
    using T = decltype(type);
    bits == 8 ? launch_bits<T, 8>(layer, queue.stream) : launch_bits<T, 4>(layer, queue.stream);
  });
}

}  // namespace vlcore::cuda
