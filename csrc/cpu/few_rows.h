// Products of few rows with a weight, which are the reading of the weight. Read once per level.
namespace vlcore::VLCORE_LEVEL {

// Outputs that a thread takes at a time; a static schedule gives each thread one stretch of the weight.
constexpr int64_t kOutputBlock = 16;
// Below this, waking a thread costs more than it brings.
constexpr int64_t kParallelWeights = 1 << 15;

// Bytes by which the weight is asked for ahead of its multiplication, into the second cache.
constexpr int64_t kPrefetched = 4096;

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

template <typename T>
VLCORE_INLINE typename Step<T>::Loaded read_first(const T* from, int64_t count) {
  T padded[Step<T>::kSize] = {};
  std::memcpy(static_cast<void*>(padded), from, count * sizeof(T));
  return Step<T>::read(padded);
}

// Rows of the weight that rows of x are multiplied with at a time, where these are many enough to keep the multipliers
// busier than the memory, or where the memory serves several streams faster than one.
constexpr int64_t kManyRows = 4, kOutputsAtOnce = kLanes == 16 ? 4 : 2;

// y[row * outputs + output], for kRows rows of x and kOutputs rows of a weight. One row of a weight is read in one
// stream, and summed in as many chains as keep the multipliers busy.
template <int kRows, int kOutputs, typename T>
static void dot_products(const T* x, const T* weight, const T* bias, T* y, int64_t outputs, int64_t inputs) {
  using S = Step<T>;
  constexpr int kChains = std::max(8 / (kRows * kOutputs), 1);
  Vec sums[kRows][kOutputs][kChains] = {};
  const auto step = [&](int chain, int64_t k) VLCORE_INLINED {
    typename S::Loaded from_weight[kOutputs];
#pragma GCC unroll 4
    for (int output = 0; output < kOutputs; ++output) {
      const T* from = weight + output * inputs + k;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetched * kOutputs, 0, 2);
      from_weight[output] = S::read(from);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const typename S::Loaded from_x = S::read(x + row * inputs + k);
#pragma GCC unroll 4
      for (int output = 0; output < kOutputs; ++output) {
        sums[row][output][chain] = S::add(sums[row][output][chain], from_weight[output], from_x);
      }
    }
  };
  int64_t k = 0;
  for (; k + kChains * S::kSize <= inputs; k += kChains * S::kSize) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) step(chain, k + chain * S::kSize);
  }
  for (; k + S::kSize <= inputs; k += S::kSize) step(0, k);
  for (int row = 0; row < kRows; ++row) {
    for (int output = 0; output < kOutputs; ++output) {
      Vec* sum = sums[row][output];
      if (k < inputs) {
        const typename S::Loaded last = read_first(x + row * inputs + k, inputs - k);
        sum[0] = S::add(sum[0], read_first(weight + output * inputs + k, inputs - k), last);
      }
      for (int chain = 1; chain < kChains; ++chain) sum[0] += sum[chain];
      const float shift = bias ? static_cast<float>(bias[output]) : 0.f;
      y[row * outputs + output] = convert<T>(reduce_add(sum[0]) + shift);
    }
  }
}

// y (rows, outputs) in its columns [begin, end): x (rows, inputs) weight (outputs, inputs)^T + bias, or null.
template <typename T>
static void multiply_rows(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t outputs,
                          int64_t inputs, int64_t begin, int64_t end) {
  int64_t output = begin;
  const auto take = [&](auto count) {
    constexpr int kOutputs = decltype(count)::value;
    const T *from = weight + output * inputs, *shift = bias ? bias + output : nullptr;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      dot_products<4, kOutputs>(x + row * inputs, from, shift, y + row * outputs + output, outputs, inputs);
    }
    for (; row + 2 <= rows; row += 2) {
      dot_products<2, kOutputs>(x + row * inputs, from, shift, y + row * outputs + output, outputs, inputs);
    }
    if (row < rows) {
      dot_products<1, kOutputs>(x + row * inputs, from, shift, y + row * outputs + output, outputs, inputs);
    }
    output += kOutputs;
  };
  const bool several = rows >= kManyRows || memory_serves_streams();
  while (several && output + kOutputsAtOnce <= end) take(std::integral_constant<int, kOutputsAtOnce>{});
  while (output < end) take(std::integral_constant<int, 1>{});
}

}  // namespace vlcore::VLCORE_LEVEL
