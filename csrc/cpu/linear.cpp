#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/linear.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void linear_forward(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t outputs,
                    int64_t inputs, Target target) {
  VLCORE_RUN(target, linear_forward, x, weight, bias, y, rows, outputs, inputs);
}

}  // namespace vlcore

#else
namespace vlcore::VLCORE_LEVEL {

// Rows of the weight, and of x, that one pass over the inputs keeps sums for.
constexpr int kWeightRows = 4;
constexpr int kInputRows = 4;

// A step along the inputs: pairs where bfloat16 is multiplied as it is, one float a lane elsewhere.
template <typename T>
struct Step {
  static constexpr int kSize = kLanes;
  using Loaded = Vec;
  VLCORE_INLINE Vec read(const T* from) { return load(from); }
  VLCORE_INLINE Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(VLCORE_BF16_DOT)
template <>
struct Step<bfloat16> {
  static constexpr int kSize = 2 * kLanes;
  using Loaded = __m512bh;
  VLCORE_INLINE __m512bh read(const bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  VLCORE_INLINE Vec add(Vec sum, __m512bh a, __m512bh b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

// y[row][output] for kWeights outputs and kRows rows of x.
template <int kRows, int kWeights, typename T>
static void dot_products(const T* x, const T* weight, const T* bias, T* y, int64_t outputs, int64_t inputs) {
  using S = Step<T>;
  constexpr int kSize = S::kSize;
  Vec sums[kWeights][kRows] = {};
  const auto step = [&](const T* xs, int64_t x_stride, const T* ws, int64_t w_stride) {
    typename S::Loaded from_x[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) from_x[row] = S::read(xs + row * x_stride);
#pragma GCC unroll 4
    for (int output = 0; output < kWeights; ++output) {
      const typename S::Loaded from_weight = S::read(ws + output * w_stride);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) sums[output][row] = S::add(sums[output][row], from_weight, from_x[row]);
    }
  };
  const int64_t whole = inputs / kSize * kSize, rest = inputs - whole;
  for (int64_t k = 0; k < whole; k += kSize) {
    // The weights come from memory, once: ask for the next rows while these are multiplied.
    __builtin_prefetch(weight + kWeights * inputs + k);
    step(x + k, inputs, weight + k, inputs);
  }
  if (rest) {
    T last_x[kRows * kSize] = {}, last_weight[kWeights * kSize] = {};
    for (int row = 0; row < kRows; ++row) {
      std::memcpy(static_cast<void*>(last_x + row * kSize), x + row * inputs + whole, rest * sizeof(T));
    }
    for (int output = 0; output < kWeights; ++output) {
      std::memcpy(static_cast<void*>(last_weight + output * kSize), weight + output * inputs + whole, rest * sizeof(T));
    }
    step(last_x, kSize, last_weight, kSize);
  }
  for (int output = 0; output < kWeights; ++output) {
    const float shift = bias ? static_cast<float>(bias[output]) : 0.f;
    for (int row = 0; row < kRows; ++row) {
      y[row * outputs + output] = convert<T>(reduce_add(sums[output][row]) + shift);
    }
  }
}

template <int kWeights, typename T>
static void outputs_of_all_rows(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t outputs,
                                int64_t inputs) {
  for (int64_t row = 0; row < rows; row += kInputRows) {
    const T* from = x + row * inputs;
    T* to = y + row * outputs;
    switch (std::min<int64_t>(rows - row, kInputRows)) {
      case 4:
        dot_products<4, kWeights>(from, weight, bias, to, outputs, inputs);
        break;
      case 3:
        dot_products<3, kWeights>(from, weight, bias, to, outputs, inputs);
        break;
      case 2:
        dot_products<2, kWeights>(from, weight, bias, to, outputs, inputs);
        break;
      default:
        dot_products<1, kWeights>(from, weight, bias, to, outputs, inputs);
    }
  }
}

template <typename T>
static void linear_forward(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t outputs,
                           int64_t inputs) {
  const int64_t groups = outputs / kWeightRows;
#pragma omp parallel for schedule(static) if (outputs * inputs >= 1 << 15)
  for (int64_t group = 0; group < groups + outputs % kWeightRows; ++group) {
    // After the groups, the outputs that are left over go one at a time.
    const int64_t first = group < groups ? group * kWeightRows : groups * kWeightRows + (group - groups);
    const T* from = static_cast<const T*>(weight) + first * inputs;
    const T* shift = bias ? static_cast<const T*>(bias) + first : nullptr;
    T* to = static_cast<T*>(y) + first;
    if (group < groups) {
      outputs_of_all_rows<kWeightRows>(static_cast<const T*>(x), from, shift, to, rows, outputs, inputs);
    } else {
      outputs_of_all_rows<1>(static_cast<const T*>(x), from, shift, to, rows, outputs, inputs);
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
