// Packing for tile.h by whole vectors, from matrices of operands whose rows are as long as whole panels. Read once per
// level.
namespace vlcore::VLCORE_LEVEL {

// Swaps what `step` apart lies across the diagonal: done for 1, 2, 4, ... it transposes kLanes rows of kLanes units.
template <int step>
VLCORE_INLINE void swap_across(IntVec* rows) {
  IntVec upper, lower;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    upper[lane] = lane & step ? kLanes + lane - step : lane;
    lower[lane] = lane & step ? kLanes + lane : lane + step;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    if (row & step) continue;
    const IntVec a = rows[row], b = rows[row + step];
    rows[row] = __builtin_shuffle(a, b, upper);
    rows[row + step] = __builtin_shuffle(a, b, lower);
  }
}

// to[col][row] = from[row][col] for kLanes rows. Units of 32 bits: a float, or two bfloat16 that stay together. Reads
// whole vectors, and writes one for each of `cols` columns.
static void transpose_units(const void* from, int64_t from_stride, int64_t cols, void* to, int64_t to_stride) {
  for (int64_t first = 0; first < cols; first += kLanes) {
    IntVec rows[kLanes];
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
      std::memcpy(&rows[row], static_cast<const int32_t*>(from) + row * from_stride + first, sizeof(IntVec));
    }
    swap_across<1>(rows);
    swap_across<2>(rows);
    if constexpr (kLanes > 4) swap_across<4 % kLanes>(rows);
    if constexpr (kLanes > 8) swap_across<8 % kLanes>(rows);
    const int64_t count = std::min<int64_t>(kLanes, cols - first);
    for (int64_t col = 0; col < count; ++col) {
      std::memcpy(static_cast<int32_t*>(to) + (first + col) * to_stride, &rows[col], sizeof(IntVec));
    }
  }
}

// A panel of columns, as pack_transposed of tile.h makes it, from kWidth rows with `depth` columns.
template <typename O>
static void panel_of_columns(const O* rows, int64_t stride, int64_t depth, O* panel) {
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  for (int first = 0; first < kWidth; first += kLanes) {
    transpose_units(rows + first * stride, stride / kGrain, padded_depth<O>(depth) / kGrain, panel + first * kGrain,
                    kWidth);
  }
}

// Panels of `depth` rows, as pack of tile.h makes them; a row after an odd last one is read and has to be zeros.
template <typename O>
static void panels_of_rows(const O* rows, int64_t stride, int64_t depth, int64_t cols, O* panels, int64_t panel_size) {
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  for (int64_t first = 0; first < cols; first += kWidth, panels += panel_size) {
    O* to = panels;
    for (int64_t d = 0; d < depth; d += kGrain, to += kWidth * kGrain) {
      const O* row = rows + d * stride + first;
      for (int vec = 0; vec < kWidth; vec += kLanes) {
        if constexpr (kGrain == 1) {
          store(to + vec, load(row + vec));
        } else {
          HalfVec even, odd;
          std::memcpy(&even, row + vec, sizeof even);
          std::memcpy(&odd, row + stride + vec, sizeof odd);
          const IntVec pairs = __builtin_convertvector(even, IntVec) | __builtin_convertvector(odd, IntVec) << 16;
          std::memcpy(static_cast<void*>(to + vec * kGrain), &pairs, sizeof pairs);
        }
      }
    }
  }
}

// C = start * C + A B, as multiply of tile.h, for panels that lie `panel_size` apart.
template <typename O>
VLCORE_INLINE void multiply_panels(const O* a, int64_t a_stride, const O* panels, int64_t panel_size, int64_t rows,
                                   int64_t cols, int64_t depth, const float* start, float* c, int64_t c_stride) {
  constexpr int64_t kWidth = Panel<O>::kWidth;
  for (int64_t first = 0; first < cols; first += kWidth, panels += panel_size) {
    multiply(a, a_stride, panels, rows, std::min(kWidth, cols - first), depth, start, c + first, c_stride);
  }
}

}  // namespace vlcore::VLCORE_LEVEL
