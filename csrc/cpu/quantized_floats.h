// Products of few rows with a weight of integers, in float32: for the levels that do not multiply bytes. Read once per
// such level.
namespace vlcore::VLCORE_LEVEL {

// Rows of the weight, and of x, that one pass over the inputs keeps sums for.
constexpr int kWeightRows = 4;
constexpr int kInputRows = 4;
// Bytes of a row that are summed before their sum goes to the others': added to a sum that has grown much larger, a
// product would lose what it is short of the sum's last place, and equal ones always the same.
constexpr int64_t kStretch = 4096;

// A weight of 8 bits: a byte a column.
struct EightBits {
  static constexpr int kColumns = 1;
  template <int kRows>
  VLCORE_INLINE void add(const uint8_t* bytes, int64_t count, const float* x, int64_t, int64_t stride, Vec* sums) {
    const Vec value = to_float(load_bytes<SignedBytes>(bytes, count));
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) sums[row] += value * load(x + row * stride);
  }
};

// Of 4 bits: two columns a byte.
struct FourBits {
  static constexpr int kColumns = 2;
  template <int kRows>
  VLCORE_INLINE void add(const uint8_t* bytes, int64_t count, const float* x, int64_t odd, int64_t stride, Vec* sums) {
    const IntVec both = load_bytes<UnsignedBytes>(bytes, count);
    const Vec low = even_columns(both), high = odd_columns(both);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      sums[row] += low * load(x + row * stride) + high * load(x + odd + row * stride);
    }
  }
};

// x as float: its columns, or for 4 bits the even ones and from `odd` on the odd ones; zeros behind them.
struct Inputs {
  const float* x;
  int64_t odd, stride;
};

// result[output][row] for kWeights rows of the weight, which are `bytes` long, and kRows rows of x.
template <typename Bits, int kRows, int kWeights>
static void dot_products(const Inputs& from, int64_t first_row, const uint8_t* values, int64_t bytes,
                         const float* scales, int64_t groups, float (*result)[kInputRows]) {
  const float* x = from.x + first_row * from.stride;
  const int64_t group_bytes = (bytes + groups - 1) / groups, stretch = std::min(group_bytes, kStretch);
  Vec totals[kWeights][kRows] = {};
  for (int64_t first = 0; first < bytes; first += stretch) {
    const int64_t group = first / group_bytes, last = std::min(first + stretch, bytes);
    Vec sums[kWeights][kRows] = {};
    for (int64_t at = first; at < last; at += kLanes) {
#pragma GCC unroll 4
      for (int output = 0; output < kWeights; ++output) {
        const uint8_t* row = values + output * bytes + at;
        Bits::template add<kRows>(row, bytes - at, x + at, from.odd, from.stride, sums[output]);
      }
    }
    for (int output = 0; output < kWeights; ++output) {
      const float scale = scales[output * groups + group];
      for (int row = 0; row < kRows; ++row) totals[output][row] += sums[output][row] * scale;
    }
  }
  for (int output = 0; output < kWeights; ++output) {
    for (int row = 0; row < kRows; ++row) result[output][row] = reduce_add(totals[output][row]);
  }
}

template <typename Bits, typename T, int kWeights>
static void outputs_of_all_rows(const Inputs& from, const uint8_t* values, int64_t bytes, const float* scales,
                                int64_t groups, const T* bias, T* y, int64_t rows, int64_t outputs) {
  for (int64_t first = 0; first < rows; first += kInputRows) {
    const int64_t count = std::min<int64_t>(rows - first, kInputRows);
    float result[kWeights][kInputRows];
    switch (count) {
      case 4:
        dot_products<Bits, 4, kWeights>(from, first, values, bytes, scales, groups, result);
        break;
      case 3:
        dot_products<Bits, 3, kWeights>(from, first, values, bytes, scales, groups, result);
        break;
      case 2:
        dot_products<Bits, 2, kWeights>(from, first, values, bytes, scales, groups, result);
        break;
      default:
        dot_products<Bits, 1, kWeights>(from, first, values, bytes, scales, groups, result);
    }
    for (int output = 0; output < kWeights; ++output) {
      const float shift = bias ? static_cast<float>(bias[output]) : 0.f;
      for (int64_t row = 0; row < count; ++row) {
        y[(first + row) * outputs + output] = convert<T>(result[output][row] + shift);
      }
    }
  }
}

// Rows of x as float32.
template <typename T>
class QuantizedRows {
 public:
  // groups and bits of the weights that the rows will be multiplied by.
  QuantizedRows(int64_t rows, int64_t inputs, int64_t groups, int bits)
      : rows_(rows),
        inputs_(inputs),
        groups_(groups),
        columns_(bits == 8 ? 1 : 2),
        bytes_((inputs + columns_ - 1) / columns_),
        odd_(round_up(bytes_, kLanes)),
        wide_(rows * odd_ * columns_) {}

  // Takes x (rows, inputs).
  void read(const T* x) {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t column = 0; column < inputs_; ++column) {
        const int64_t place = (row * columns_ + column % columns_) * odd_ + column / columns_;
        wide_[place] = static_cast<float>(x[row * inputs_ + column]);
      }
    }
  }

  // y (rows, outputs) in its columns [begin, end), for a weight (outputs, bytes) with scales (outputs, groups).
  void multiply(const uint8_t* values, const float* scales, const T* bias, T* y, int64_t outputs, int64_t begin,
                int64_t end) const {
    const auto run = columns_ == 1 ? &QuantizedRows::template all_outputs<EightBits>
                                   : &QuantizedRows::template all_outputs<FourBits>;
    (this->*run)(values, scales, bias, y, outputs, begin, end);
  }

 private:
  template <typename Bits>
  void all_outputs(const uint8_t* values, const float* scales, const T* bias, T* y, int64_t outputs, int64_t begin,
                   int64_t end) const {
    const Inputs from{wide_.data(), odd_, odd_ * columns_};
    int64_t at = begin;
    const auto block = [&](auto size) {
      outputs_of_all_rows<Bits, T, decltype(size)::value>(from, values + at * bytes_, bytes_, scales + at * groups_,
                                                          groups_, bias ? bias + at : nullptr, y + at, rows_, outputs);
      at += size;
    };
    while (at + kWeightRows <= end) block(std::integral_constant<int, kWeightRows>{});
    while (at < end) block(std::integral_constant<int, 1>{});
  }

  int64_t rows_, inputs_, groups_, columns_, bytes_, odd_;
  std::vector<float> wide_;
};

}  // namespace vlcore::VLCORE_LEVEL
