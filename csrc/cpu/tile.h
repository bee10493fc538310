// Small matrix products in registers, at one level; read once per level by for_each_level.h.
//
// C (rows, cols) = A (rows, depth) B (depth, cols). A is row-major. B is packed: panels of Panel<T>::kWidth columns,
// each (depth, kWidth), or with bfloat16's dot product (depth / 2, kWidth, 2). Packing pads with zeros to whole panels
// and to a multiple of Panel<T>::kDepth, so that nothing here needs a mask; A and C are scratch with rows as long, and
// where whole tiles are multiplied with a multiple of kRows of them.
#include "cpu/tile_unit.h"

namespace vlcore::VLCORE_LEVEL {

// What matrix products are computed in for tensors of T: bfloat16 where the level multiplies it, float elsewhere.
#if defined(VLCORE_BF16_DOT)
template <typename T>
using Operand = T;
#else
template <typename T>
using Operand = float;
#endif

#if defined(VLCORE_AMX)
template <typename O>
constexpr bool kInTiles = std::is_same_v<O, bfloat16>;
#else
template <typename O>
constexpr bool kInTiles = false;
#endif

template <typename O>
struct Panel {
  static constexpr int kVecs = kLanes == 16 ? 4 : 2;
  static constexpr int kWidth = kVecs * kLanes;
  static constexpr int kRows = kInTiles<O> ? 16 : kLanes == 4 ? 4 : 6;
  // How many steps of the depth stand side by side in a panel, and what all depths are a multiple of.
  static constexpr int kGrain = std::is_same_v<O, bfloat16> ? 2 : 1;
  static constexpr int kDepth = kInTiles<O> ? 32 : kGrain;
};

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

template <typename O>
constexpr int64_t padded_depth(int64_t depth) {
  return round_up(depth, Panel<O>::kDepth);
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
      const T* even = d < depth ? from + d * stride : nullptr;
      const T* odd = kGrain == 2 && d + 1 < depth ? from + (d + 1) * stride : nullptr;
      std::memset(static_cast<void*>(to), 0, kWidth * kGrain * sizeof(O));
      if (odd) {
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) {
          to[2 * c] = convert<O>(even[first + c]);
          to[2 * c + 1] = convert<O>(odd[first + c]);
        }
        continue;
      }
      for (int64_t c = 0; even && c < width; ++c) to[c * kGrain] = convert<O>(even[first + c]);
    }
  }
}

// B[d][c] = from[c * stride + d].
template <typename O, typename T>
static void pack_transposed(const T* from, int64_t stride, int64_t depth, int64_t cols, O* to) {
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  for (int64_t first = 0; first < cols; first += kWidth, to += padded_depth<O>(depth) * kWidth) {
    for (int64_t c = 0; c < kWidth; ++c) {
      const T* row = first + c < cols ? from + (first + c) * stride : nullptr;
      const int64_t present = row ? depth : 0, whole = present / kGrain * kGrain;
      O* column = to + c * kGrain;
      for (int64_t d = 0; d < whole; d += kGrain, column += kWidth * kGrain) {
        for (int grain = 0; grain < kGrain; ++grain) column[grain] = convert<O>(row[d + grain]);
      }
      for (int64_t d = whole; d < padded_depth<O>(depth); d += kGrain, column += kWidth * kGrain) {
        for (int grain = 0; grain < kGrain; ++grain) {
          column[grain] = d + grain < present ? convert<O>(row[d + grain]) : O(0.f);
        }
      }
    }
  }
}

// kRows rows of A times kVecs vectors of a panel. An element of A at depth d stands d / kGrain * a_step behind its
// row's first: with a_stride = kGrain and a_step = kWidth * kGrain, a packed panel is read as its transpose. Tiles are
// of rows whose depth lies side by side: for them a_step is always kGrain.
template <int kRows, int kVecs, typename O>
VLCORE_INLINE void multiply_in_registers(const O* a, int64_t a_stride, int64_t a_step, const O* panel, int64_t depth,
                                         Vec (&sums)[kRows][kVecs]) {
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
#if defined(VLCORE_AMX)
  if constexpr (kInTiles<O>) {
    return multiply_tiles<kVecs, kWidth>(a, a_stride, panel, depth, false, reinterpret_cast<float*>(sums),
                                         kVecs * kLanes);
  }
#endif
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      sums[row][vec] = Vec{};
    }
  }
  for (int64_t d = 0; d < depth; d += kGrain, a += a_step, panel += kWidth * kGrain) {
    if constexpr (std::is_same_v<O, float>) {
      Vec b[kVecs];
#pragma GCC unroll 4
      for (int vec = 0; vec < kVecs; ++vec) b[vec] = load(panel + vec * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Vec factor = broadcast(a[row * a_stride]);
#pragma GCC unroll 4
        for (int vec = 0; vec < kVecs; ++vec) sums[row][vec] += factor * b[vec];
      }
    } else {
#if defined(VLCORE_BF16_DOT)
      __m512bh b[kVecs];
#pragma GCC unroll 4
      for (int vec = 0; vec < kVecs; ++vec) b[vec] = (__m512bh)_mm512_loadu_si512(panel + vec * 2 * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        int32_t pair;
        std::memcpy(&pair, a + row * a_stride, sizeof pair);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int vec = 0; vec < kVecs; ++vec) {
          sums[row][vec] = (Vec)_mm512_dpbf16_ps((__m512)sums[row][vec], factor, b[vec]);
        }
      }
#endif
    }
  }
}

// C = start * C, row by row.
template <int kRows, int kVecs>
VLCORE_INLINE void scale_rows(const float* start, float* c, int64_t c_stride) {
  for (int row = 0; row < kRows; ++row) {
    if (start[row] == 1.f) continue;
    for (int vec = 0; vec < kVecs; ++vec) {
      float* to = c + row * c_stride + vec * kLanes;
      store(to, load(to) * start[row]);
    }
  }
}

// kRows rows of C and kVecs vectors of columns: C = start * C + A B, where `start` has a factor for each row; null
// stands for 0. A B is summed by itself first: the errors of long sums in float32 grow with what they begin from.
// Tiles, of bfloat16, begin from C.
template <int kRows, int kVecs, typename O>
VLCORE_INLINE void multiply_panel(const O* a, int64_t a_stride, int64_t a_step, const O* panel, int64_t depth,
                                  const float* start, float* c, int64_t c_stride) {
#if defined(VLCORE_AMX)
  if constexpr (kInTiles<O>) {
    if (start) scale_rows<kRows, kVecs>(start, c, c_stride);
    return multiply_tiles<kVecs, Panel<O>::kWidth>(a, a_stride, panel, depth, start, c, c_stride);
  }
#endif
  Vec sums[kRows][kVecs];
  multiply_in_registers(a, a_stride, a_step, panel, depth, sums);
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      float* to = c + row * c_stride + vec * kLanes;
      store(to, start ? load(to) * start[row] + sums[row][vec] : sums[row][vec]);
    }
  }
}

// As multiply_panel, for 1..Panel<O>::kRows rows and all panels of `cols`, of which whole vectors are written.
// `depth` is a padded one.
template <int kRows, typename O>
static void multiply_rows(const O* a, int64_t a_stride, int64_t a_step, const O* packed, int64_t cols, int64_t depth,
                          const float* start, float* c, int64_t c_stride) {
  constexpr int kWidth = Panel<O>::kWidth, kVecs = Panel<O>::kVecs;
  for (int64_t first = 0; first < cols; first += kWidth, packed += depth * kWidth, c += kWidth) {
    const int64_t vecs = (cols - first + kLanes - 1) / kLanes;
    if (vecs >= kVecs) {
      multiply_panel<kRows, kVecs>(a, a_stride, a_step, packed, depth, start, c, c_stride);
    } else if (vecs == 1) {
      multiply_panel<kRows, 1>(a, a_stride, a_step, packed, depth, start, c, c_stride);
    } else if (vecs == 2) {
      multiply_panel<kRows, 2>(a, a_stride, a_step, packed, depth, start, c, c_stride);
    } else {
      multiply_panel<kRows, 3>(a, a_stride, a_step, packed, depth, start, c, c_stride);
    }
  }
}

template <typename O>
static void multiply(const O* a, int64_t a_stride, const O* packed, int64_t rows, int64_t cols, int64_t depth,
                     const float* start, float* c, int64_t c_stride, int64_t a_step = Panel<O>::kGrain) {
  if constexpr (kInTiles<O>) {
    return multiply_rows<Panel<O>::kRows>(a, a_stride, a_step, packed, cols, depth, start, c, c_stride);
  } else {
    switch (rows) {
      case 6:
        return multiply_rows<6>(a, a_stride, a_step, packed, cols, depth, start, c, c_stride);
      case 5:
        return multiply_rows<5>(a, a_stride, a_step, packed, cols, depth, start, c, c_stride);
      case 4:
        return multiply_rows<4>(a, a_stride, a_step, packed, cols, depth, start, c, c_stride);
      case 3:
        return multiply_rows<3>(a, a_stride, a_step, packed, cols, depth, start, c, c_stride);
      case 2:
        return multiply_rows<2>(a, a_stride, a_step, packed, cols, depth, start, c, c_stride);
      default:
        return multiply_rows<1>(a, a_stride, a_step, packed, cols, depth, start, c, c_stride);
    }
  }
}

// As multiply, for any number of rows.
template <typename O>
static void multiply_all(const O* a, int64_t a_stride, const O* packed, int64_t rows, int64_t cols, int64_t depth,
                         const float* start, float* c, int64_t c_stride) {
  constexpr int kRows = Panel<O>::kRows;
  for (int64_t first = 0; first < rows; first += kRows) {
    multiply(a + first * a_stride, a_stride, packed, std::min<int64_t>(kRows, rows - first), cols, depth,
             start ? start + first : nullptr, c + first * c_stride, c_stride);
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
