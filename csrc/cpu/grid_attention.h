// Attention over a grid with decomposed relative positions, for the operators that do it on a whole map or in windows:
// what forward and backward share. docs/rel_pos_attention.md derives both. Read once per level.
//
// Keys are laid out by lanes: each image row begins on a vector, so that a vector of scores needs one rel_h, and a
// vector of rel_w that is the same in every image row.
#include "cpu/panels.h"

namespace vlcore::VLCORE_LEVEL {

// Queries that are computed together; a multiple of the level's kRows, kDepth and kLanes * kGrain. The backward of
// each block goes through the sums of all keys and values, which tiles wait for: with them, blocks are larger.
constexpr int64_t kBlockRows = kInTiles<bfloat16> ? 192 : 96;

struct Grid {
  int64_t height, width, head_dim;

  int64_t tokens() const { return height * width; }
  int64_t row_lanes() const { return round_up(width, kLanes); }
  int64_t lanes() const { return height * row_lanes(); }
  float scale() const { return 1.f / std::sqrt(static_cast<float>(head_dim)); }
};

// What scores are kept times. With log2(e) the softmax is exp2; in float32 the rounding of that product would be seen
// where scores are large, so there it waits until the maximum is off.
template <typename O>
constexpr float kLogUnit = std::is_same_v<O, bfloat16> ? kLog2E : 1.f;

// One query: what it reads and writes, and where it stands. The statistics of its softmax are the maximum that it is
// taken relative to, and its sum. The backward reads `out` and them.
template <typename T>
struct Query {
  const T* q;
  T* out;
  float* statistics;
  int64_t y, x;
  const T* grad_out;
  T* grad_q;
};

// Work is cut by the shape alone, so that no sum depends on the number of threads: chunks that threads take, each of a
// run of units, and units of a head's queries, which are cut where there are few heads.
constexpr int64_t kMaxChunks = 64, kFewHeads = 24;

inline int64_t cut(int64_t size, int64_t pieces, int64_t index) { return size * index / pieces; }

// Below this many products, waking a thread costs more than it brings.
constexpr int64_t kParallelProducts = 1 << 18;

// Calls block(first, count) for all `count` queries, in blocks of about one size, whole groups but for the last.
template <typename T, typename Block>
static void for_blocks(int64_t count, const Block& block) {
  constexpr int64_t kRows = Panel<Operand<T>>::kRows;
  const int64_t groups = (count + kRows - 1) / kRows, num_blocks = (count + kBlockRows - 1) / kBlockRows;
  for (int64_t index = 0; index < num_blocks; ++index) {
    const int64_t first = cut(groups, num_blocks, index) * kRows;
    block(first, std::min(count, cut(groups, num_blocks, index + 1) * kRows) - first);
  }
}

// Keys or values by lane: row(y, x) is that of a key; where none stands the row is null.
template <typename T, typename Row>
static std::vector<const T*> rows_by_lane(const Grid& grid, const Row& row) {
  std::vector<const T*> rows(grid.lanes());
  for (int64_t y = 0; y < grid.height; ++y) {
    for (int64_t x = 0; x < grid.width; ++x) rows[y * grid.row_lanes() + x] = row(y, x);
  }
  return rows;
}

// Rows by lane, packed for the products that sum over head_dim (columns) and for those that sum over keys (rows), by
// panels of kWidth lanes.
template <typename O>
class PackedLanes {
 public:
  PackedLanes(const Grid& grid, bool has_columns, bool has_rows)
      : num_panels((grid.lanes() + kWidth - 1) / kWidth),
        rows_size(padded_depth<O>(grid.lanes()) * kWidth),
        depth_(grid.head_dim),
        stride_(padded_cols<O>(depth_)),
        panel_(kWidth * stride_),
        columns_(has_columns ? num_panels * packed_size<O>(depth_, kWidth) : 0),
        rows_(has_rows ? packed_size<O>(grid.lanes(), depth_) : 0),
        has_columns_(has_columns),
        has_rows_(has_rows) {}

  template <typename T>
  void pack(const std::vector<const T*>& rows) {
    const int64_t lanes = rows.size();
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const T* from = panel * kWidth + lane < lanes ? rows[panel * kWidth + lane] : nullptr;
        O* to = panel_.get() + lane * stride_;
        for (int64_t d = 0; d < depth_; ++d) to[d] = from ? convert<O>(from[d]) : O(0.f);
      }
      if (has_columns_) {
        panel_of_columns(panel_.get(), stride_, depth_, columns_.get() + panel * packed_size<O>(depth_, kWidth));
      }
      if (has_rows_) {
        const int64_t first = panel * kWidth, present = std::min(kWidth, padded_depth<O>(lanes) - first);
        panels_of_rows(panel_.get(), stride_, present, depth_, rows_.get() + first * kWidth, rows_size);
      }
    }
  }
  const O* columns(int64_t panel) const { return columns_.get() + panel * packed_size<O>(depth_, kWidth); }
  // Those of one panel of head_dim's columns, from a lane on; the next panel's stand rows_size behind.
  const O* rows(int64_t lane) const { return rows_.get() + lane * kWidth; }

  static constexpr int64_t kWidth = Panel<O>::kWidth;
  const int64_t num_panels, rows_size;

 private:
  const int64_t depth_, stride_;
  const Scratch<O> panel_, columns_, rows_;
  const bool has_columns_, has_rows_;
};

// A table of positions, last row first: then what a query at `place` adds to keys 0, 1, ... stands in the columns
// size - 1 - place and on.
template <typename O>
struct PackedTable {
  template <typename T>
  PackedTable(const T* table, int64_t size, int64_t head_dim)
      : size(size),
        num_offsets(2 * size - 1),
        columns(packed_size<O>(head_dim, num_offsets)),
        rows(packed_size<O>(num_offsets, head_dim)) {
    const T* last = table + (num_offsets - 1) * head_dim;
    pack_transposed(last, -head_dim, head_dim, num_offsets, columns.get());
    pack(last, -head_dim, num_offsets, head_dim, rows.get());
  }

  const int64_t size, num_offsets;
  const Scratch<O> columns, rows;
};

// A block of queries: q, and what their positions add to scores, rel_h (rows, Y) and rel_w (rows, w_stride), with a
// last vector of -inf for what is no key. Rows behind the last query are zeros, up to whole groups of kRows.
template <typename T>
class QueryBlock {
 public:
  using O = Operand<T>;
  static constexpr int kRows = Panel<O>::kRows;

  explicit QueryBlock(const Grid& grid)
      : grid(grid),
        q_stride(padded_depth<O>(grid.head_dim)),
        w_stride(grid.row_lanes() + kLanes),
        out_stride(round_up(grid.head_dim, kLanes)),
        q(kBlockRows * q_stride),
        rel_h(kBlockRows * grid.height),
        rel_w(kBlockRows * w_stride),
        ones(std::max(kBlockRows, out_stride)),
        offsets_stride_(round_up(2 * std::max(grid.height, grid.width) - 1, kLanes)),
        offsets_(kRows * offsets_stride_) {
    std::fill(ones.get(), ones.get() + std::max(kBlockRows, out_stride), 1.f);
    std::fill(rel_w.get(), rel_w.get() + kBlockRows * w_stride, -INFINITY);
  }

  void load_queries(const Query<T>* queries, int64_t count, const PackedTable<O>& table_h,
                    const PackedTable<O>& table_w) {
    rows = round_up(count, kRows);
    std::memset(static_cast<void*>(q.get()), 0, rows * q_stride * sizeof(O));
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t d = 0; d < grid.head_dim; ++d) q.get()[row * q_stride + d] = convert<O>(queries[row].q[d]);
    }
    const auto place = [&](int64_t row) { return row < count ? queries[row] : Query<T>{}; };
    positions(table_h, rel_h.get(), grid.height, [&](int64_t row) { return place(row).y; });
    positions(table_w, rel_w.get(), w_stride, [&](int64_t row) { return place(row).x; });
  }

  const Grid grid;
  int64_t rows = 0;
  const int64_t q_stride, w_stride, out_stride;
  const Scratch<O> q;
  const Scratch<float> rel_h, rel_w, ones;

 private:
  template <typename Place>
  void positions(const PackedTable<O>& table, float* to, int64_t stride, const Place& place) {
    for (int64_t first = 0; first < rows; first += kRows) {
      multiply(q.get() + first * q_stride, q_stride, table.columns.get(), kRows, table.num_offsets, q_stride, nullptr,
               offsets_.get(), offsets_stride_);
      for (int64_t row = 0; row < kRows; ++row) {
        const float* from = offsets_.get() + row * offsets_stride_ + table.size - 1 - place(first + row);
        for (int64_t i = 0; i < table.size; ++i) to[(first + row) * stride + i] = from[i] * kLogUnit<O>;
      }
    }
  }

  const TileUnit tile_unit_;
  const int64_t offsets_stride_;
  const Scratch<float> offsets_;
};

// Where the vectors of a panel stand in the grid. Behind the last, x is where rel_w holds -inf.
template <typename O>
struct Places {
  Places(const Grid& grid, int64_t panel) {
    for (int vec = 0; vec < Panel<O>::kVecs; ++vec) {
      const int64_t lane = panel * Panel<O>::kWidth + vec * kLanes;
      y[vec] = lane < grid.lanes() ? lane / grid.row_lanes() : 0;
      x[vec] = lane < grid.lanes() ? lane % grid.row_lanes() : grid.row_lanes();
      num_vecs += lane < grid.lanes();
    }
  }

  int64_t y[Panel<O>::kVecs], x[Panel<O>::kVecs], num_vecs = 0;
};

// Calls run(num_vecs) with the number of a panel's vectors as a constant.
template <typename O, typename Run>
VLCORE_INLINE void for_num_vecs(const Places<O>& places, const Run& run) {
  if (places.num_vecs == Panel<O>::kVecs) return run(std::integral_constant<int, Panel<O>::kVecs>{});
  if (places.num_vecs == 1) return run(std::integral_constant<int, 1>{});
  if constexpr (Panel<O>::kVecs == 4) {
    if (places.num_vecs == 2) return run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 3>{});
  }
}

// The products of kRows queries and kVecs vectors of keys.
template <int kVecs, typename T, int kRows>
VLCORE_INLINE void multiply_keys(const QueryBlock<T>& block, int64_t first, const Operand<T>* keys,
                                 Vec (&products)[kRows][kVecs]) {
  multiply_in_registers(block.q.get() + first * block.q_stride, block.q_stride, Panel<Operand<T>>::kGrain, keys,
                        block.q_stride, products);
}

// What products become: scores, times kLogUnit.
template <typename T>
struct Scores {
  using O = Operand<T>;

  Scores(const QueryBlock<T>& block, int64_t first, const Places<O>& places)
      : rel_h(block.rel_h.get() + first * block.grid.height),
        rel_w(block.rel_w.get() + first * block.w_stride),
        height(block.grid.height),
        w_stride(block.w_stride),
        scale(block.grid.scale() * kLogUnit<O>),
        places(places) {}

  VLCORE_INLINED Vec operator()(Vec product, int64_t row, int vec) const {
    return product * scale + load(rel_w + row * w_stride + places.x[vec]) + rel_h[row * height + places.y[vec]];
  }

  const float *const rel_h, *const rel_w;
  const int64_t height, w_stride;
  const float scale;
  const Places<O>& places;
};

// exp of a score as far as an operand of a product holds it: bfloat16 rounds by 2^-9, this errs by 2^-13.
template <typename O>
VLCORE_INLINE Vec exp_of_score(Vec x) {
#if defined(VLCORE_BF16_DOT)
  if constexpr (std::is_same_v<O, bfloat16>) {
    const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec p = broadcast(7.802452147006989e-2f);
    p = p * fraction + 2.2606715559959412e-1f;
    p = p * fraction + 6.958335638046265e-1f;
    p = p * fraction + 9.999251961708069e-1f;
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
  }
#endif
  return exp(x);
}

// Stores neighbouring vectors as operands, up to a whole depth with zeros.
template <int kVecs, typename O>
VLCORE_INLINE void store_operands(O* to, const Vec (&from)[kVecs]) {
  if constexpr (padded_depth<O>(kVecs * kLanes) > kVecs * kLanes) store(to + kVecs * kLanes, Vec{});
#if defined(VLCORE_BF16_DOT)
  if constexpr (std::is_same_v<O, bfloat16> && kVecs % 2 == 0) {
#pragma GCC unroll 2
    for (int vec = 0; vec < kVecs; vec += 2) {
      _mm512_storeu_si512(to + vec * kLanes, (__m512i)_mm512_cvtne2ps_pbh((__m512)from[vec + 1], (__m512)from[vec]));
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int vec = 0; vec < kVecs; ++vec) store(to + vec * kLanes, from[vec]);
}

}  // namespace vlcore::VLCORE_LEVEL
