// Matrix products of many rows, blocked for the caches, at one level; included by a kernel's file within its level. The
// file reads <atomic> and <omp.h> for those in tiles.
#include "cpu/panels.h"
#include "cpu/views.h"
#if defined(VLCORE_AMX)
#include "cpu/tile_product.h"
#endif

namespace vlcore::VLCORE_LEVEL {

// A block of C is summed over blocks of the depth. Of bfloat16, a packed block of B (256 KiB) and the block of C share
// the second-level cache, and six rows of A the first.
constexpr int64_t kBlockRows = 384;
constexpr int64_t kBlockCols = 256;
// The sums of float32 are kept short for their accuracy: a chain of 1024 errs three times as far as torch.
template <typename T>
constexpr int64_t kBlockDepth = std::is_same_v<T, float> ? 256 : 1024;
// Blocks that are worth splitting for, to keep the threads busy to the end.
constexpr int64_t kBlocks = 16;

// As pack_transposed without a conversion, for whole vectors of columns.
template <typename O>
static void pack_transposed_by_squares(const O* from, int64_t stride, int64_t depth, int64_t cols, O* to) {
  constexpr int64_t kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth, kSquare = kLanes * kGrain;
  const int64_t whole = depth / kSquare * kSquare;
  for (int64_t first = 0; first < cols; first += kLanes) {
    O* panel = to + first / kWidth * kWidth * padded_depth<O>(depth) + first % kWidth * kGrain;
    transpose_units(from + first * stride, stride / kGrain, whole / kGrain, panel, kWidth);
    for (int64_t d = whole; d < padded_depth<O>(depth); ++d) {
      for (int64_t c = 0; c < kLanes; ++c) {
        panel[d / kGrain * kGrain * kWidth + c * kGrain + d % kGrain] =
            d < depth ? from[(first + c) * stride + d] : O(0.f);
      }
    }
  }
}

// B, or A as a B of its transpose: (depth, cols), from (d, c).
template <typename O, typename T>
static void pack_view(View<T> from, int64_t d, int64_t c, int64_t depth, int64_t cols, O* to) {
  if (from.col == 1) return pack(from.at(d, c), from.row, depth, cols, to);
  if constexpr (std::is_same_v<O, T>) {
    if (from.col % Panel<O>::kGrain == 0) {
      const int64_t whole = cols / Panel<O>::kWidth * Panel<O>::kWidth;
      pack_transposed_by_squares(from.at(d, c), from.col, depth, whole, to);
      c += whole;
      cols -= whole;
      to += whole * padded_depth<O>(depth);
    }
  }
  pack_transposed(from.at(d, c), from.col, depth, cols, to);
}

// How the rows of A are read: as they lie, or from a packed copy, whose panels are kWidth rows.
template <typename O>
struct Rows {
  const O* data;
  int64_t stride, step, panel_size;
  const O* at(int64_t row) const {
    return panel_size ? data + row / Panel<O>::kWidth * panel_size + row % Panel<O>::kWidth * stride
                      : data + row * stride;
  }
};

template <typename O, typename T>
static Rows<O> rows_of(View<T> a, int64_t first, int64_t d, int64_t rows, int64_t depth, O* copy) {
  constexpr int64_t kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  if constexpr (std::is_same_v<O, T>) {
    if (a.col == 1 && depth % kGrain == 0) return {a.at(first, d), a.row, kGrain, 0};
  }
  if (a.col == 1) {
    const int64_t stride = padded_depth<O>(depth);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < stride; ++j)
        copy[i * stride + j] = j < depth ? convert<O>(*a.at(first + i, d + j)) : O(0.f);
    }
    return {copy, stride, kGrain, 0};
  }
  pack(a.at(first, d), a.col, depth, rows, copy);
  return {copy, kGrain, kWidth * kGrain, kWidth * padded_depth<O>(depth)};
}

// C is computed in blocks of these rows and columns; the shape alone decides.
struct Blocks {
  int64_t rows, cols, down, across;
};

static Blocks blocks_of(int64_t rows, int64_t cols, int64_t row_grain, int64_t col_grain) {
  int64_t height = even_block(rows, kBlockRows, row_grain), width = even_block(cols, kBlockCols, col_grain);
  if (parts(rows, height) * parts(cols, width) < kBlocks) width = col_grain;
  if (parts(rows, height) * parts(cols, width) < kBlocks) height = even_block(rows, kBlockRows / 4, row_grain);
  return {height, width, parts(rows, height), parts(cols, width)};
}

// C (rows, cols) = A (rows, depth) B (depth, cols). finish(row, col, cols, sums) writes a part of a row of C.
template <typename T, typename Finish>
static void matrix_product(View<T> a, View<T> b, int64_t rows, int64_t cols, int64_t depth, const Finish& finish) {
  using O = Operand<T>;
#if defined(VLCORE_AMX)
  if constexpr (kInTiles<O>) return matrix_product_in_tiles(a, b, rows, cols, depth, finish);
#endif
  constexpr int64_t kWidth = Panel<O>::kWidth, kRows = Panel<O>::kRows;
  // A group of rows lies within one panel of a packed copy.
  const int64_t panel_rows = a.col == 1 ? kRows : kWidth;
  const Blocks blocks = blocks_of(rows, cols, panel_rows, kWidth);
  const int64_t block_depth = std::clamp<int64_t>(padded_depth<O>(depth), Panel<O>::kGrain, kBlockDepth<T>);
  const bool reads_a = std::is_same_v<O, T> && a.col == 1 && depth % Panel<O>::kGrain == 0;
#pragma omp parallel if (rows * cols * depth >= 1 << 19)
  {
    const Scratch<O> packed(packed_size<O>(block_depth, blocks.cols));
    const Scratch<O> copy(reads_a ? 0 : packed_size<O>(block_depth, blocks.rows));
    const Scratch<float> sums((depth > block_depth ? blocks.rows : kRows) * blocks.cols), ones(kRows);
    std::fill_n(ones.get(), kRows, 1.f);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks.down * blocks.across; ++block) {
      const int64_t top = block % blocks.down * blocks.rows, left = block / blocks.down * blocks.cols;
      const int64_t height = std::min(blocks.rows, rows - top), width = std::min(blocks.cols, cols - left);
      for (int64_t d = 0; d == 0 || d < depth; d += block_depth) {
        const int64_t deep = std::min(block_depth, depth - d);
        pack_view(b, d, left, deep, width, packed.get());
        const Rows<O> from = rows_of(a, top, d, height, deep, copy.get());
        for (int64_t row = 0, next; row < height; row = next) {
          next = std::min({row + kRows, height, row / panel_rows * panel_rows + panel_rows});
          float* to = sums.get() + (depth > block_depth ? row * blocks.cols : 0);
          multiply(from.at(row), from.stride, packed.get(), next - row, width, padded_depth<O>(deep),
                   d ? ones.get() : nullptr, to, blocks.cols, from.step);
          if (d + block_depth < depth) continue;
          for (int64_t i = row; i < next; ++i) finish(top + i, left, width, to + (i - row) * blocks.cols);
        }
      }
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
