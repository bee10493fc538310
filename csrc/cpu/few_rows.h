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

// y[row * outputs], for kRows rows of x, of one row of a weight. It is read in one stream, which is what the memory
// serves fastest, and summed in as many chains as keep the multipliers busy.
template <int kRows, typename T>
static void dot_products(const T* x, const T* weight, float shift, T* y, int64_t outputs, int64_t inputs) {
  using S = Step<T>;
  constexpr int kChains = 8 / kRows;
  Vec sums[kRows][kChains] = {};
  const auto step = [&](int chain, int64_t k) VLCORE_INLINED {
    __builtin_prefetch(reinterpret_cast<const char*>(weight + k) + kPrefetched, 0, 2);
    const typename S::Loaded from_weight = S::read(weight + k);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      sums[row][chain] = S::add(sums[row][chain], from_weight, S::read(x + row * inputs + k));
    }
  };
  int64_t k = 0;
  for (; k + kChains * S::kSize <= inputs; k += kChains * S::kSize) {
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) step(chain, k + chain * S::kSize);
  }
  for (; k + S::kSize <= inputs; k += S::kSize) step(0, k);
  for (int row = 0; row < kRows; ++row) {
    if (k < inputs) {
      const typename S::Loaded last = read_first(x + row * inputs + k, inputs - k);
      sums[row][0] = S::add(sums[row][0], read_first(weight + k, inputs - k), last);
    }
    for (int chain = 1; chain < kChains; ++chain) sums[row][0] += sums[row][chain];
    y[row * outputs] = convert<T>(reduce_add(sums[row][0]) + shift);
  }
}

// y (rows, outputs) in its columns [begin, end): x (rows, inputs) weight (outputs, inputs)^T + bias, or null.
template <typename T>
static void multiply_rows(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t outputs,
                          int64_t inputs, int64_t begin, int64_t end) {
  for (int64_t output = begin; output < end; ++output) {
    const T* from = weight + output * inputs;
    const float shift = bias ? static_cast<float>(bias[output]) : 0.f;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      dot_products<4>(x + row * inputs, from, shift, y + row * outputs + output, outputs, inputs);
    }
    for (; row + 2 <= rows; row += 2) {
      dot_products<2>(x + row * inputs, from, shift, y + row * outputs + output, outputs, inputs);
    }
    if (row < rows) dot_products<1>(x + row * inputs, from, shift, y + row * outputs + output, outputs, inputs);
  }
}

}  // namespace vlcore::VLCORE_LEVEL
