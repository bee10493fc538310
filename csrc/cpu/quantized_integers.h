// Products of few rows with a weight of integers, in integers: exact, and as fast as the weight can be read. Read at
// the levels that multiply bytes.
namespace vlcore::VLCORE_LEVEL {

// Bytes of a weight's row that one instruction multiplies.
constexpr int64_t kStep = 64;
// A lane's sum of that many steps is below 2^31: 4 products a step, each of two magnitudes of at most 128 (or, twice
// as many, of at most 8 and 128). On the way there a sum may wrap around, and does no harm.
constexpr int64_t kMaxSteps = 1 << 14;

// Rows of the weight that are multiplied at a time, and how far ahead they are asked for, at least.
constexpr int64_t kWeightRows = 4;
constexpr int64_t kPrefetchedIntegers = 8192;

// Rows of x as integers: x = unit * (digits[last] + digits[last - 1] / 256 + ...), the digits in -127..127 or
// -128..127, so that the largest x of the row has 127 for its last. Three hold any bfloat16 to 2^-24 of the largest,
// which leaves most of its bits to what is a thousandth of that; a float32 needs four.
//
// The instruction multiplies unsigned bytes by signed ones, and a weight w becomes the unsigned byte w + offset. Sums
// therefore begin at -offset * sum(digits), which is what makes them those of w.
template <typename T>
class QuantizedRows {
 public:
  // groups and bits of the weights that the rows will be multiplied by.
  QuantizedRows(int64_t rows, int64_t inputs, int64_t groups, int bits)
      : rows_(rows),
        inputs_(inputs),
        halves_(bits == 8 ? 1 : 2),
        bytes_((inputs + halves_ - 1) / halves_),
        groups_(groups),
        group_lanes_(groups == 1 ? 0 : bytes_ / groups / 4),
        steps_((bytes_ + kStep - 1) / kStep),
        segment_steps_(groups == 1 ? kMaxSteps : std::max<int64_t>(bytes_ / groups / kStep, 1)),
        digits_size_(steps_ * halves_ * kDigits),
        starts_size_((steps_ + segment_steps_ - 1) / segment_steps_ * kDigits),
        units_(rows),
        digits_(rows * digits_size_),
        starts_(rows * starts_size_) {}

  // Takes x (rows, inputs).
  void read(const T* x) {
    for (int64_t row = 0; row < rows_; ++row) split(x + row * inputs_, row);
  }

  // y (rows, outputs) in its columns [begin, end), for a weight (outputs, bytes) with scales (outputs, groups).
  void multiply(const uint8_t* values, const float* scales, const T* bias, T* y, int64_t outputs, int64_t begin,
                int64_t end) const {
    const auto run = halves_ == 1 ? outputs_of<1>() : outputs_of<2>();
    (this->*run)(values, scales, bias, y, outputs, begin, end);
  }

 private:
  static constexpr int kDigits = std::is_same_v<T, float> ? 4 : 3;
  using Outputs = void (QuantizedRows::*)(const uint8_t*, const float*, const T*, T*, int64_t, int64_t, int64_t) const;

  void split(const T* x, int64_t row) {
    Vec magnitudes = {};
    bool finite = true;
    for_vecs(inputs_, [&](int64_t at, auto lanes) VLCORE_INLINED {
      const Vec value = load(x + at, lanes);
      magnitudes = maximum((Vec)_mm512_abs_ps((__m512)value), magnitudes);
      finite &= _mm512_cmp_ps_mask((__m512)(value - value), _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
    });
    const float largest = reduce_max(magnitudes), top = 127.f * (1 << 8 * (kDigits - 1));
    // What is not finite makes all of its row so.
    units_[row] = finite ? largest / 127.f : NAN;
    // A row of nothing but the smallest numbers counts as zeros.
    const float inverse = finite && largest > 1e-30f ? top / largest : 0.f;
    const IntVec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
    const auto integers = [&](int64_t column) {
      const int64_t count = inputs_ - column;
      const Vec value = count >= kLanes ? load(x + column) : count > 0 ? load_first(x + column, count) : Vec{};
      return (IntVec)_mm512_cvtps_epi32((__m512)(value * inverse));
    };
    int8_t* to = digits_of(row);
    for (int64_t byte = 0; byte < steps_ * kStep; byte += kLanes) {
      // Where two columns share a byte, the even ones are one vector and the odd ones another.
      IntVec first = inverse ? integers(byte * halves_) : IntVec{}, second = {};
      if (halves_ == 2 && inverse) {
        const IntVec next = integers(byte * 2 + kLanes), both = first;
        first = (IntVec)_mm512_permutex2var_epi32((__m512i)both, (__m512i)even, (__m512i)next);
        second = (IntVec)_mm512_permutex2var_epi32((__m512i)both, (__m512i)odd, (__m512i)next);
      }
      int8_t* place = to + byte / kStep * halves_ * kDigits * kStep + byte % kStep;
      store_digits(first, place);
      if (halves_ == 2) store_digits(second, place + kDigits * kStep);
    }
    set_starts(to, starts_of(row));
  }

  static void store_digits(IntVec value, int8_t* to) {
    for (int digit = 0; digit < kDigits; ++digit) {
      const IntVec low = digit + 1 < kDigits ? (value << 24) >> 24 : value;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + digit * kStep), _mm512_cvtepi32_epi8((__m512i)low));
      value = (value - low) >> 8;
    }
  }

  void set_starts(const int8_t* digits, int32_t* starts) {
    const __m512i ones = _mm512_set1_epi8(1);
    std::fill(starts, starts + starts_size_ * kLanes, 0);
    for (int64_t step = 0; step < steps_ * halves_; ++step) {
      for (int digit = 0; digit < kDigits; ++digit) {
        int32_t* start = starts + (step / halves_ / segment_steps_ * kDigits + digit) * kLanes;
        const __m512i from = _mm512_loadu_si512(digits + (step * kDigits + digit) * kStep);
        const IntVec sum = (IntVec)_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, from);
        const IntVec old = (IntVec)_mm512_loadu_si512(start);
        _mm512_storeu_si512(start, (__m512i)(old - (sum << (halves_ == 1 ? 7 : 3))));
      }
    }
  }

  template <int kHalves>
  Outputs outputs_of() const {
    switch (group_lanes_) {
      case 0:
        return &QuantizedRows::template all_outputs<kHalves, 0>;
      case 4:
        return &QuantizedRows::template all_outputs<kHalves, 4>;
      case 8:
        return &QuantizedRows::template all_outputs<kHalves, 8>;
      case 16:
        return &QuantizedRows::template all_outputs<kHalves, 16>;
      default:
        return &QuantizedRows::template all_outputs<kHalves, 32>;
    }
  }

  template <int kHalves, int kGroupLanes>
  void all_outputs(const uint8_t* values, const float* scales, const T* bias, T* y, int64_t outputs, int64_t begin,
                   int64_t end) const {
    int64_t output = begin;
    const auto several = [&](auto count) VLCORE_INLINED {
      constexpr int kOutputs = decltype(count)::value;
      for (int64_t row = 0; row < rows_; ++row) {
        float sums[kOutputs];
        dots<kHalves, kGroupLanes, kOutputs>(values + output * bytes_, scales + output * groups_, row, sums);
        for (int index = 0; index < kOutputs; ++index) {
          const float shift = bias ? static_cast<float>(bias[output + index]) : 0.f;
          y[row * outputs + output + index] = convert<T>(sums[index] * units_[row] + shift);
        }
      }
      output += kOutputs;
    };
    while (output + kWeightRows <= end) several(std::integral_constant<int, kWeightRows>{});
    while (output < end) several(std::integral_constant<int, 1>{});
  }

  // kOutputs rows of the weight times one of x. A group's scale holds for kGroupLanes lanes of the sums (32: for those
  // of two steps; 0: for all of the row).
  template <int kHalves, int kGroupLanes, int kOutputs>
  VLCORE_INLINED void dots(const uint8_t* weight, const float* scales, int64_t row, float* results) const {
    constexpr int64_t kSteps = kGroupLanes == 0 ? kMaxSteps : kGroupLanes == 32 ? 2 : 1;
    constexpr int64_t kScales = kGroupLanes == 4 ? 4 : kGroupLanes == 8 ? 2 : 1;
    const int8_t* digits = digits_of(row);
    const int32_t* starts = starts_of(row);
    const int64_t whole = bytes_ / kStep;
    // The same place of rows to come. Multiplying takes long enough that loads do not run far ahead by themselves.
    const int64_t ahead = round_up(kPrefetchedIntegers, kOutputs * bytes_);
    Vec totals[kOutputs] = {};
    const auto segment = [&](int64_t first, int64_t last, __mmask64 rest, __mmask8 kept) VLCORE_INLINED {
      const int64_t index = first / kSteps;
      IntVec sums[kOutputs][kDigits];
#pragma GCC unroll 4
      for (int digit = 0; digit < kDigits; ++digit) {
        const IntVec start = (IntVec)_mm512_loadu_si512(starts + (index * kDigits + digit) * kLanes);
#pragma GCC unroll 4
        for (int output = 0; output < kOutputs; ++output) sums[output][digit] = start;
      }
      for (int64_t step = first; step < last; ++step) {
        __m512i bytes[kOutputs];
#pragma GCC unroll 4
        for (int output = 0; output < kOutputs; ++output) {
          const uint8_t* from = weight + output * bytes_ + step * kStep;
          __builtin_prefetch(from + ahead, 0, 2);
          bytes[output] = _mm512_loadu_si512(from);
        }
        add_step<kHalves, kOutputs>(bytes, digits + step * kHalves * kDigits * kStep, sums);
      }
      if (rest) {
        __m512i bytes[kOutputs];
#pragma GCC unroll 4
        for (int output = 0; output < kOutputs; ++output) {
          bytes[output] = _mm512_maskz_loadu_epi8(rest, weight + output * bytes_ + last * kStep);
        }
        add_step<kHalves, kOutputs>(bytes, digits + last * kHalves * kDigits * kStep, sums);
      }
#pragma GCC unroll 4
      for (int output = 0; output < kOutputs; ++output) {
        const Vec scale = scales_of<kGroupLanes>(scales + output * groups_ + index * kScales, kept);
        totals[output] += value_of(sums[output]) * scale;
      }
    };
    int64_t first = 0;
    for (; first + kSteps <= whole; first += kSteps) segment(first, first + kSteps, 0, (1 << kScales) - 1);
    if (first < steps_) {
      const int64_t left = bytes_ % kStep, groups = std::min<int64_t>(groups_ - first / kSteps * kScales, kScales);
      segment(first, whole, left ? ~0ull >> (kStep - left) : 0, (1 << (kGroupLanes ? groups : 1)) - 1);
    }
    for (int output = 0; output < kOutputs; ++output) {
      results[output] = reduce_add(totals[output]) * (kGroupLanes == 0 ? scales[output] : 1.f);
    }
  }

  template <int kHalves, int kOutputs>
  VLCORE_INLINED static void add_step(const __m512i* bytes, const int8_t* digits, IntVec (*sums)[kDigits]) {
    const __m512i nibbles = _mm512_set1_epi8(15);
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      __m512i values[kOutputs];
#pragma GCC unroll 4
      for (int output = 0; output < kOutputs; ++output) {
        values[output] = kHalves == 1 ? _mm512_xor_si512(bytes[output], _mm512_set1_epi8(-128))
                         : half == 0  ? _mm512_and_si512(bytes[output], nibbles)
                                      : _mm512_and_si512(_mm512_srli_epi16(bytes[output], 4), nibbles);
      }
#pragma GCC unroll 4
      for (int digit = 0; digit < kDigits; ++digit) {
        const __m512i x = _mm512_loadu_si512(digits + (half * kDigits + digit) * kStep);
#pragma GCC unroll 4
        for (int output = 0; output < kOutputs; ++output) {
          sums[output][digit] = (IntVec)_mm512_dpbusd_epi32((__m512i)sums[output][digit], values[output], x);
        }
      }
    }
  }

  VLCORE_INLINED static Vec value_of(const IntVec* sums) {
    Vec value = __builtin_convertvector(sums[0], Vec);
#pragma GCC unroll 4
    for (int digit = 1; digit < kDigits; ++digit) {
      value = value * (1.f / 256) + __builtin_convertvector(sums[digit], Vec);
    }
    return value;
  }

  // A scale for each lane; those of groups that are not kept are not read.
  template <int kGroupLanes>
  VLCORE_INLINED static Vec scales_of(const float* scales, __mmask8 kept) {
    if (kGroupLanes == 0) return broadcast(1.f);
    if (kGroupLanes >= 16) return broadcast(scales[0]);
    const IntVec place = IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} / std::max(kGroupLanes, 1);
    const __m512 few = _mm512_castps128_ps512(_mm_maskz_loadu_ps(kept, scales));
    return (Vec)_mm512_permutexvar_ps((__m512i)place, few);
  }

  // Loads that straddle two cache lines would take most of the time.
  struct alignas(kStep) Digits {
    int8_t of_columns[kStep];
  };
  struct alignas(kStep) Start {
    int32_t of_lanes[kLanes];
  };

  int8_t* digits_of(int64_t row) { return digits_[row * digits_size_].of_columns; }
  const int8_t* digits_of(int64_t row) const { return digits_[row * digits_size_].of_columns; }
  int32_t* starts_of(int64_t row) { return starts_[row * starts_size_].of_lanes; }
  const int32_t* starts_of(int64_t row) const { return starts_[row * starts_size_].of_lanes; }

  int64_t rows_, inputs_, halves_, bytes_, groups_, group_lanes_, steps_, segment_steps_, digits_size_, starts_size_;
  std::vector<float> units_;
  std::vector<Digits> digits_;
  std::vector<Start> starts_;
};

}  // namespace vlcore::VLCORE_LEVEL
