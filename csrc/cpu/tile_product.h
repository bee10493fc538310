// Matrix products of many rows in tiles (AMX), at one level; included by matrix_product.h.
//
// C is computed in parts of 32 x 32, two tiles by two: a tile that is loaded is multiplied twice. Columns of B are
// packed as tiles, as many as the second-level cache holds well, and read from there past the first-level one. A's rows
// pass by them in strips of 32, of which a block of the depth stays in the first-level cache.
//
// The tile unit needs 64 cycles for a step, 32 of the depth of a part, and leaves the core nearly idle. So whatever
// else there is to do is done between its steps, a little at each: the sums of the part before are added to those of
// the depth before and finished, and the strip that comes next is packed. In larger pieces it would not overlap.
#include "cpu/tile_packer.h"

namespace vlcore::VLCORE_LEVEL {

// Columns of B that are packed together: 384 of depth 1024. With 1 MiB of them, or deeper ones, products are a tenth
// slower.
constexpr int64_t kPackedSize = 768 * 1024 / sizeof(bfloat16), kPackedDepth = 1440;
// Of a strip, 32 KiB of the first-level cache's 48: what else is read and written needs the rest.
constexpr int64_t kStripDepth = 512;
// The most rows that pass by before other columns are packed: where the depth is in blocks, sums of all are kept.
constexpr int64_t kMostRows = 640;
// The most columns, where the depth leaves room for more.
constexpr int64_t kMostCols = 640;
// The fewest that rows and columns are cut to for the threads to have as many blocks each.
constexpr int64_t kFewestRows = 128, kFewestCols = 256;

// Memory on a huge page that a thread keeps from product to product: page by page it would take as long to get as a
// product does.
static unsigned char* kept_memory(int64_t size) {
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  struct Kept {
    std::unique_ptr<unsigned char, Free> memory;
    int64_t size = 0;
  };
  constexpr int64_t kHugePage = 2 << 20;
  static thread_local Kept kept;
  if (kept.size < size) {
    kept.size = 0;
    size = round_up(size, kHugePage);
    kept.memory.reset(static_cast<unsigned char*>(std::aligned_alloc(kHugePage, size)));
    if (!kept.memory) throw std::bad_alloc();
    kept.size = size;
    prefer_huge_pages(kept.memory.get(), size);
  }
  return kept.memory.get();
}

// Blocks of work, each in parts. A thread takes a block that nobody has, part by part, and at last helps with others'.
class SharedBlocks {
 public:
  SharedBlocks(int64_t blocks, int64_t parts) : blocks_(blocks), parts_(parts), taken_(blocks) {
    for (auto& taken : taken_) taken = 0;
  }

  // The next part of a thread whose last one was of `block`, or -1; false if none is left.
  bool take(int64_t& block, int64_t& part) {
    if (block >= 0 && take_part(block, part)) return true;
    while ((block = fresh_++) < blocks_) {
      if (take_part(block, part)) return true;
    }
    for (block = 0; block < blocks_; ++block) {
      if (take_part(block, part)) return true;
    }
    return false;
  }

 private:
  bool take_part(int64_t block, int64_t& part) { return taken_[block] < parts_ && (part = taken_[block]++) < parts_; }

  int64_t blocks_, parts_;
  std::atomic<int64_t> fresh_{0};
  std::vector<std::atomic<int64_t>> taken_;
};

// How C (rows, cols) = A (rows, depth) B (depth, cols) is cut up. B is given transposed: (cols, depth).
struct TilePlan {
  View<bfloat16> a, b;
  int64_t rows, cols, depth;
  int64_t row_block, col_block, depth_block, strip_depth;

  TilePlan(View<bfloat16> a_, View<bfloat16> b_, int64_t rows_, int64_t cols_, int64_t depth_)
      : a(a_), b(b_), rows(rows_), cols(cols_), depth(depth_) {
    // The depth alone decides in which order its sums are added; the rest depends on the threads.
    depth_block = even_block(depth, kPackedDepth, kTileDepth);
    strip_depth = even_block(depth_block, kStripDepth, kTileDepth);
    const int64_t threads = omp_get_max_threads(), most = std::min(kPackedSize / depth_block, kMostCols);
    // Columns are cut for the threads only where blocks of rows do not go round: each block of columns packs all of A.
    const bool goes_round = is_whole() && rows >= 2 * kFewestRows * threads;
    const int64_t even = std::max<int64_t>(round_up(parts(cols, most), goes_round ? 1 : threads), 1);
    col_block = even_block(cols, std::min(most, std::max(parts(cols, even), kFewestCols)), kStrip);
    // Each block of rows has columns packed anew where the depth is in blocks.
    const int64_t wanted = parts((is_whole() ? 4 : 1) * threads, std::max<int64_t>(col_blocks(), 1));
    row_block = even_block(rows, std::min(std::max(parts(rows, wanted), kFewestRows), kMostRows), kStrip);
  }
  int64_t col_blocks() const { return parts(cols, col_block); }
  int64_t row_blocks() const { return parts(rows, row_block); }
  // Whether all of the depth is packed together; the sums of a strip are then done before the next begins.
  bool is_whole() const { return depth_block >= depth; }
  int64_t sums_size() const { return col_block * (is_whole() ? kStrip : row_block); }
};

// What one thread does of a product. finish(row, col, cols, sums) writes a part of a row of C. Of A either the steps of
// the depth lie side by side, or the rows do.
template <bool kOfSteps, typename Finish>
class TileProduct {
 public:
  TileProduct(const TilePlan& plan, const Finish& finish) : plan_(plan), finish_(finish) {
    const int64_t packed_size = plan.col_block * plan.depth_block, strip_size = kStrip * plan.depth_block;
    const int64_t operands = (packed_size + 2 * strip_size) * int64_t{sizeof(bfloat16)};
    const int64_t sums = (plan.sums_size() + kStrip * kStrip + kStrip) * int64_t{sizeof(float)};
    unsigned char* memory = kept_memory(operands + sums);
    packed_ = reinterpret_cast<bfloat16*>(memory);
    strips_[0] = packed_ + packed_size;
    strips_[1] = strips_[0] + strip_size;
    sums_ = reinterpret_cast<float*>(memory + operands);
    stored_ = sums_ + plan.sums_size();
    zeros_ = stored_ + kStrip * kStrip;
    std::fill_n(zeros_, kStrip, 0.f);
  }

  // The blocks are of columns, and their parts blocks of rows.
  void run(SharedBlocks& work) {
    const TileUnit unit;
    int64_t packed_block = -1, packed_depth = -1;
    for (int64_t block = -1, part; work.take(block, part);) {
      for (int64_t d = 0; d == 0 || d < plan_.depth; d += plan_.depth_block) {
        if (block != packed_block || d != packed_depth) pack_columns(block * plan_.col_block, d);
        packed_block = block;
        packed_depth = d;
        multiply_block(part * plan_.row_block, block * plan_.col_block, d);
      }
    }
    // The last part's sums are still in the unit.
    multiply(nullptr, nullptr, 0);
  }

 private:
  // A part of C whose sums over some of the depth are in the unit.
  struct Part {
    int64_t row, col, rows, cols;
    // The sums of the depth before, or a row of zeros.
    const float* before;
    int64_t before_step;
    // Where all of them are kept, or null behind the last of the depth, when they are finished.
    float* kept;
  };

  void pack_columns(int64_t left, int64_t d) {
    const int64_t width = std::min(plan_.col_block, plan_.cols - left);
    const int64_t depth = std::min(plan_.depth_block, plan_.depth - d);
    const bool is_of_steps = plan_.b.col == 1;
    // All along what lies side by side.
    const int64_t piece = is_of_steps ? depth : kTileDepth;
    for (int64_t k = 0; k < depth; k += piece) {
      for (int64_t col = 0; col < width; col += kStrip) {
        const StripTiles tiles(plan_.b.from(left + col, d + k), std::min(kStrip, width - col),
                               std::min(piece, depth - k), packed_ + col * round_up(depth, kTileDepth) + k * kStrip);
        is_of_steps ? pack_tiles<true, true>(tiles) : pack_tiles<false, false>(tiles);
      }
    }
  }

  // A block of C over a block of the depth, from (top, left) and d on, with the packed columns.
  void multiply_block(int64_t top, int64_t left, int64_t d) {
    const int64_t height = std::min(plan_.row_block, plan_.rows - top);
    const int64_t width = std::min(plan_.col_block, plan_.cols - left);
    const int64_t depth = std::min(plan_.depth_block, plan_.depth - d), padded = round_up(depth, kTileDepth);
    const auto strip_of = [&](int64_t row) { return strips_[row / kStrip % 2]; };
    const auto tiles_of = [&](int64_t row) {
      return StripTiles(plan_.a.from(top + row, d), std::min(kStrip, height - row), depth, strip_of(row));
    };
    pack_tiles<kOfSteps, !kOfSteps>(tiles_of(0));
    for (int64_t row = 0; row < height; row += kStrip) {
      start_packing(row + kStrip < height ? tiles_of(row + kStrip) : StripTiles(),
                    padded / kTileDepth * parts(width, kStrip));
      for (int64_t k = 0; k == 0 || k < padded; k += plan_.strip_depth) {
        const int64_t steps = std::min(plan_.strip_depth, padded - k) / kTileDepth;
        const bool is_first = d == 0 && k == 0;
        const bool is_last = d + plan_.depth_block >= plan_.depth && k + plan_.strip_depth >= padded;
        for (int64_t col = 0; col < width; col += kStrip) {
          multiply(strip_of(row) + k * kStrip, packed_ + col * padded + k * kStrip, steps);
          float* kept = sums_ + ((plan_.is_whole() ? 0 : row * plan_.col_block) + col * kStrip);
          former_ = {top + row,
                     left + col,
                     std::min(kStrip, height - row),
                     std::min(kStrip, width - col),
                     is_first ? zeros_ : kept,
                     is_first ? 0 : kStrip,
                     is_last ? nullptr : kept};
        }
      }
      pack_rest();
    }
  }

  // Packs a strip beside so many steps.
  void start_packing(const StripTiles& tiles, int64_t steps) {
    tiles_ = tiles;
    steps_ = std::max<int64_t>(steps, 1);
    quarters_ = std::min(4 * tiles_.left(), steps_);
    due_ = 0;
    quarter_ = tiles_.left() ? 0 : 4;
    if (tiles_.left()) tile_ = tiles_.next();
  }

  void pack_rest() {
    while (quarter_ < 4) {
      pack_quarter<kOfSteps, !kOfSteps>(tile_, quarter_);
      if (++quarter_ < 4 || !tiles_.left()) continue;
      tile_ = tiles_.next();
      quarter_ = 0;
    }
  }

  void multiply(const bfloat16* a, const bfloat16* b, int64_t steps) {
    if (former_.kept) {
      multiply_beside<false>(a, b, steps);
    } else {
      multiply_beside<true>(a, b, steps);
    }
  }

  // Leaves a strip times 32 packed columns in the unit, which holds the former part's sums; those are dealt with, and
  // the next strip packed, between the steps.
  template <bool kFinishes>
  __attribute__((noinline)) void multiply_beside(const bfloat16* a, const bfloat16* b, int64_t steps) {
    constexpr int64_t kRow = kStrip * sizeof(float), kBelow = kTileSide * kStrip;
    // What changes is held in registers.
    const Finish finish = finish_;
    const int64_t quarters = quarters_, all_steps = steps_, col = former_.col, cols = former_.cols;
    const int64_t rows_a_step = steps > 1 ? (kStrip + steps - 2) / (steps - 1) : kStrip;
    Tile tile = tile_;
    int64_t quarter = quarter_, due = due_;
    int64_t row = former_.row, rows = kFinishes ? former_.rows : kStrip;
    float *stored = stored_, *kept = former_.kept;
    const float* before = former_.before;
    const int64_t before_step = former_.before_step;

    const auto multiply_step = [&](auto leaves) VLCORE_INLINED {
      load_passing_tile<4>(b, 64);
      load_tile<6>(a, 64);
      if constexpr (leaves) store_tile<0>(stored, kRow), clear_tile<0>();
      multiply_tile<0, 6, 4>();
      load_passing_tile<5>(b + kTileSize, 64);
      if constexpr (leaves) store_tile<1>(stored + kTileSide, kRow), clear_tile<1>();
      multiply_tile<1, 6, 5>();
      load_tile<7>(a + kTileSize, 64);
      if constexpr (leaves) store_tile<2>(stored + kBelow, kRow), clear_tile<2>();
      multiply_tile<2, 7, 4>();
      if constexpr (leaves) store_tile<3>(stored + kBelow + kTileSide, kRow), clear_tile<3>();
      multiply_tile<3, 7, 5>();
      a += 2 * kTileSize;
      b += 2 * kTileSize;
    };
    const auto pack_some = [&]() VLCORE_INLINED {
      if (quarter == 4 || (due += quarters) < all_steps) return;
      due -= all_steps;
      pack_quarter<kOfSteps, !kOfSteps>(tile, quarter);
      if (++quarter == 4 && tiles_.left()) {
        tile = tiles_.next();
        quarter = 0;
      }
    };
    const auto add_rows = [&](int64_t most) VLCORE_INLINED {
      for (int64_t left = std::min(most, rows); left > 0; --left, --rows, ++row) {
        const Vec first = load(stored) + load(before), second = load(stored + kLanes) + load(before + kLanes);
        float* to = kFinishes ? stored : kept;
        store(to, first);
        store(to + kLanes, second);
        if (kFinishes) finish(row, col, cols, to);
        stored += kStrip;
        before += before_step;
        if (!kFinishes) kept += kStrip;
      }
    };

    if (steps) {
      multiply_step(std::true_type{});
      pack_some();
      for (int64_t step = 1; step < steps; ++step) {
        multiply_step(std::false_type{});
        pack_some();
        add_rows(rows_a_step);
      }
    } else {
      store_tile<0>(stored, kRow), clear_tile<0>();
      store_tile<1>(stored + kTileSide, kRow), clear_tile<1>();
      store_tile<2>(stored + kBelow, kRow), clear_tile<2>();
      store_tile<3>(stored + kBelow + kTileSide, kRow), clear_tile<3>();
    }
    add_rows(kStrip);
    tile_ = tile;
    quarter_ = quarter;
    due_ = due;
  }

  const TilePlan& plan_;
  const Finish& finish_;
  bfloat16 *packed_, *strips_[2];
  float *sums_, *stored_, *zeros_;
  Part former_ = {};
  // The strip that is being packed, by `quarters_` quarters of tiles every `steps_` steps.
  StripTiles tiles_;
  Tile tile_ = {};
  int64_t quarter_ = 4, quarters_ = 0, steps_ = 1, due_ = 0;
};

template <bool kOfSteps, typename Finish>
static void multiply_in_tiles(const TilePlan& plan, const Finish& finish) {
  SharedBlocks work(plan.col_blocks(), plan.row_blocks());
#pragma omp parallel if (plan.rows * plan.cols * plan.depth >= 1 << 19)
  TileProduct<kOfSteps, Finish>(plan, finish).run(work);
}

// As matrix_product.
template <typename Finish>
static void matrix_product_in_tiles(View<bfloat16> a, View<bfloat16> b, int64_t rows, int64_t cols, int64_t depth,
                                    const Finish& finish) {
  const TilePlan plan(a, {b.data, b.col, b.row}, rows, cols, depth);
  a.col == 1 ? multiply_in_tiles<true>(plan, finish) : multiply_in_tiles<false>(plan, finish);
}

}  // namespace vlcore::VLCORE_LEVEL
