// Small matrix products in registers, at one level; read once per level by for_each_level.h.
//
// C (rows, cols) = A (rows, depth) B (depth, cols). A is row-major. B is packed: panels of Panel<T>::kWidth columns,
// each (depth, kWidth), or with bfloat16's dot product (depth / 2, kWidth, 2). Packing pads with zeros to whole panels
// and, for bfloat16, to an even depth, so that nothing here needs a mask; A and C are scratch with rows as long.
namespace vlcore::VLCORE_LEVEL {

// What matrix products are computed in for tensors of T: bfloat16 where the level multiplies it, float elsewhere.
#if defined(VLCORE_BF16_DOT)
template <typename T>
using Operand = T;
#else
template <typename T>
using Operand = float;
#endif

template <typename O>
struct Panel {
  static constexpr int kVecs = kLanes == 16 ? 4 : 2;
  static constexpr int kWidth = kVecs * kLanes;
  static constexpr int kRows = kLanes == 16 ? 6 : kLanes == 8 ? 6 : 4;
  // How many steps of the depth are multiplied at once.
  static constexpr int kGrain = std::is_same_v<O, bfloat16> ? 2 : 1;
};

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

template <typename O>
constexpr int64_t padded_depth(int64_t depth) {
  return round_up(depth, Panel<O>::kGrain);
}

template <typename O>
constexpr int64_t padded_cols(int64_t cols) {
  return round_up(cols, Panel<O>::kWidth);
}

// Elements of a packed (depth, cols).
template <typename O>
constexpr int64_t packed_size(int64_t depth, int64_t cols) {
  return padded_depth<O>(depth) * padded_cols<O>(cols);
}

template <typename O, typename T>
VLCORE_INLINE O convert(T value) {
  if constexpr (std::is_same_v<O, T>) {
    return value;
  } else {
    return O(static_cast<float>(value));
  }
}

// B[d][c] = from[d * stride + c].
template <typename O, typename T>
static void pack(const T* from, int64_t stride, int64_t depth, int64_t cols, O* to) {
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  for (int64_t first = 0; first < cols; first += kWidth) {
    const int64_t width = std::min<int64_t>(kWidth, cols - first);
    for (int64_t d = 0; d < padded_depth<O>(depth); d += kGrain, to += kWidth * kGrain) {
      for (int grain = 0; grain < kGrain; ++grain) {
        const T* row = from + (d + grain) * stride + first;
        const int64_t present = d + grain < depth ? width : 0;
        for (int64_t c = 0; c < present; ++c) to[c * kGrain + grain] = convert<O>(row[c]);
        for (int64_t c = present; c < kWidth; ++c) to[c * kGrain + grain] = O(0.f);
      }
    }
  }
}

// B[d][c] = from[c * stride + d]: the rows of `from` become columns.
template <typename O, typename T>
static void pack_transposed(const T* from, int64_t stride, int64_t depth, int64_t cols, O* to) {
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  for (int64_t first = 0; first < cols; first += kWidth, to += padded_depth<O>(depth) * kWidth) {
    const int64_t width = std::min<int64_t>(kWidth, cols - first);
    for (int64_t c = 0; c < width; ++c) {
      const T* row = from + (first + c) * stride;
      for (int64_t d = 0; d < depth; ++d) to[(d / kGrain * kWidth + c) * kGrain + d % kGrain] = convert<O>(row[d]);
      for (int64_t d = depth; d < padded_depth<O>(depth); ++d) {
        to[(d / kGrain * kWidth + c) * kGrain + d % kGrain] = O(0.f);
      }
    }
    for (int64_t c = width; c < kWidth; ++c) {
      for (int64_t d = 0; d < padded_depth<O>(depth); ++d) to[(d / kGrain * kWidth + c) * kGrain + d % kGrain] = O(0.f);
    }
  }
}

// kRows rows of C and one panel: C = start * C + A B, where `start` has a factor for each row; null stands for 0.
// A B is summed by itself first: the errors of long sums in float32 grow with what they begin from.
// kVecs may be fewer vectors than a panel has: its first columns.
template <int kRows, int kVecs, typename O>
VLCORE_INLINE void multiply_panel(const O* a, int64_t a_stride, const O* panel, int64_t depth, const float* start,
                                  float* c, int64_t c_stride) {
  constexpr int kWidth = Panel<O>::kWidth;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      sums[row][vec] = Vec{};
    }
  }
  for (int64_t d = 0; d < depth; d += Panel<O>::kGrain) {
    if constexpr (std::is_same_v<O, float>) {
      Vec b[kVecs];
#pragma GCC unroll 4
      for (int vec = 0; vec < kVecs; ++vec) b[vec] = load(panel + d * kWidth + vec * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Vec factor = broadcast(a[row * a_stride + d]);
#pragma GCC unroll 4
        for (int vec = 0; vec < kVecs; ++vec) sums[row][vec] += factor * b[vec];
      }
    } else {
#if defined(VLCORE_BF16_DOT)
      __m512bh b[kVecs];
#pragma GCC unroll 4
      for (int vec = 0; vec < kVecs; ++vec)
        b[vec] = (__m512bh)_mm512_loadu_si512(panel + d * kWidth + vec * 2 * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        int32_t pair;
        std::memcpy(&pair, a + row * a_stride + d, sizeof pair);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int vec = 0; vec < kVecs; ++vec) {
          sums[row][vec] = (Vec)_mm512_dpbf16_ps((__m512)sums[row][vec], factor, b[vec]);
        }
      }
#endif
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      float* to = c + row * c_stride + vec * kLanes;
      store(to, start ? load(to) * start[row] + sums[row][vec] : sums[row][vec]);
    }
  }
}

// As multiply_panel, for 1..Panel<O>::kRows rows and all panels of `cols`, or their first kVecsOfPanel vectors. `depth`
// is a padded one.
template <int kVecsOfPanel = 0, typename O>
static void multiply(const O* a, int64_t a_stride, const O* packed, int64_t rows, int64_t cols, int64_t depth,
                     const float* start, float* c, int64_t c_stride) {
  constexpr int kVecs = kVecsOfPanel ? kVecsOfPanel : Panel<O>::kVecs;
  for (int64_t first = 0; first < cols; first += Panel<O>::kWidth, packed += depth * Panel<O>::kWidth) {
    float* out = c + first;
    switch (rows) {
      case 6:
        multiply_panel<6, kVecs>(a, a_stride, packed, depth, start, out, c_stride);
        break;
      case 5:
        multiply_panel<5, kVecs>(a, a_stride, packed, depth, start, out, c_stride);
        break;
      case 4:
        multiply_panel<4, kVecs>(a, a_stride, packed, depth, start, out, c_stride);
        break;
      case 3:
        multiply_panel<3, kVecs>(a, a_stride, packed, depth, start, out, c_stride);
        break;
      case 2:
        multiply_panel<2, kVecs>(a, a_stride, packed, depth, start, out, c_stride);
        break;
      default:
        multiply_panel<1, kVecs>(a, a_stride, packed, depth, start, out, c_stride);
    }
  }
}

// Room for `size` elements on a boundary of 64 bytes, which a thread keeps for itself.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(size * sizeof(T) + 64) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = reinterpret_cast<T*>((address + 63) & ~uintptr_t{63});
  }
  T* get() const { return data_; }

 private:
  std::vector<unsigned char> memory_;
  T* data_;
};

}  // namespace vlcore::VLCORE_LEVEL
