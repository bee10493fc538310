// Attention over a grid with decomposed relative positions, for the operators that do it on a whole map or in windows.
// Read once per level.
//
// A tile of keys is a whole number of image rows, about 64 keys. Scores are kept times log2(e), so that the softmax is
// exp2: t = s * scale + rel_w is one FMA, as rel_w is the same for every tile, and rel_h joins the running maximum.
namespace vlcore::VLCORE_LEVEL {

constexpr int64_t kBlockRows = 48;

struct Grid {
  int64_t height, width, head_dim;

  int64_t tokens() const { return height * width; }
  int64_t rows_per_tile() const { return std::min(std::max<int64_t>(64 / width, 1), height); }
  int64_t tile_keys() const { return rows_per_tile() * width; }
  int64_t num_tiles() const { return (height + rows_per_tile() - 1) / rows_per_tile(); }
};

// Queries that are computed together: where each is read and written, and where it stands.
template <typename T>
struct Queries {
  int64_t count = 0;
  const T* q[kBlockRows];
  T* out[kBlockRows];
  float* lse[kBlockRows];
  int64_t y[kBlockRows], x[kBlockRows];

  void add(const T* from, T* to, float* statistic, int64_t row, int64_t column) {
    q[count] = from, out[count] = to, lse[count] = statistic, y[count] = row, x[count] = column;
    ++count;
  }
};

// Keys and values of one head, and the tables of positions, packed for tile.h.
template <typename O>
struct PackedGrid {
  const O *keys, *values, *table_h, *table_w;
};

template <typename O>
static int64_t packed_keys_size(const Grid& grid) {
  return packed_size<O>(grid.head_dim, grid.tile_keys());
}

template <typename O>
static int64_t packed_values_size(const Grid& grid) {
  return packed_size<O>(grid.tile_keys(), grid.head_dim);
}

template <typename O, typename T>
static void pack_tile(const T* k, const T* v, const Grid& grid, int64_t tile, O* keys, O* values) {
  const int64_t first = tile * grid.tile_keys();
  const int64_t count = std::min(grid.tile_keys(), grid.tokens() - first), dim = grid.head_dim;
  pack_transposed(k + first * dim, dim, dim, count, keys + tile * packed_keys_size<O>(grid));
  pack(v + first * dim, dim, count, dim, values + tile * packed_values_size<O>(grid));
}

// What a thread needs to attend with a block of queries.
template <typename T>
class GridScratch {
  using O = Operand<T>;

 public:
  explicit GridScratch(const Grid& grid)
      : tile_stride(padded_cols<O>(grid.tile_keys())),
        q_stride(padded_depth<O>(grid.head_dim)),
        out_stride(padded_cols<O>(grid.head_dim)),
        offsets_stride(padded_cols<O>(2 * std::max(grid.height, grid.width) - 1)),
        q(kBlockRows * q_stride),
        probabilities(Panel<O>::kRows * tile_stride),
        scores(Panel<O>::kRows * tile_stride),
        offsets(Panel<O>::kRows * offsets_stride),
        rel_h(kBlockRows * grid.height),
        rel_w(kBlockRows * tile_stride),
        out(kBlockRows * out_stride) {}

  const int64_t tile_stride, q_stride, out_stride, offsets_stride;
  const Scratch<O> q, probabilities;
  const Scratch<float> scores, offsets, rel_h, rel_w, out;
};

// rel_h (count, Y) and rel_w (count, tile), times log2(e); a column of the tile that holds no key gets -inf.
template <typename T>
static void relative_positions(const Queries<T>& queries, const PackedGrid<Operand<T>>& packed, const Grid& grid,
                               const GridScratch<T>& scratch) {
  constexpr int kRows = Panel<Operand<T>>::kRows;
  const float* offsets = scratch.offsets.get();
  for (int64_t first = 0; first < queries.count; first += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, queries.count - first);
    const auto* q = scratch.q.get() + first * scratch.q_stride;
    multiply(q, scratch.q_stride, packed.table_h, rows, 2 * grid.height - 1, scratch.q_stride, nullptr,
             scratch.offsets.get(), scratch.offsets_stride);
    for (int64_t row = 0; row < rows; ++row) {
      const float* nearest = offsets + row * scratch.offsets_stride + queries.y[first + row] + grid.height - 1;
      float* rel_h = scratch.rel_h.get() + (first + row) * grid.height;
      for (int64_t y = 0; y < grid.height; ++y) rel_h[y] = nearest[-y] * kLog2E;
    }
    multiply(q, scratch.q_stride, packed.table_w, rows, 2 * grid.width - 1, scratch.q_stride, nullptr,
             scratch.offsets.get(), scratch.offsets_stride);
    for (int64_t row = 0; row < rows; ++row) {
      const float* nearest = offsets + row * scratch.offsets_stride + queries.x[first + row] + grid.width - 1;
      float* rel_w = scratch.rel_w.get() + (first + row) * scratch.tile_stride;
      for (int64_t key = 0; key < grid.tile_keys(); ++key) rel_w[key] = nearest[-(key % grid.width)] * kLog2E;
      for (int64_t key = grid.tile_keys(); key < scratch.tile_stride; ++key) rel_w[key] = -INFINITY;
    }
  }
}

// One query and one tile of the online softmax: scores become probabilities relative to the running maximum.
// Returns the factor by which what was summed before shrinks.
template <typename O>
VLCORE_INLINE float softmax_tile(float* scores, const float* rel_w, const float* rel_h, int64_t num_rows, int64_t width,
                                 int64_t stride, float scale, O* probabilities, float& maximum_so_far, float& sum) {
  Vec largest = broadcast(-INFINITY);
  const float rel = num_rows == 1 ? rel_h[0] : 0.f;
  for (int64_t key = 0; key < stride; key += kLanes) {
    const Vec t = load(scores + key) * scale + load(rel_w + key);
    store(scores + key, t);
    largest = maximum(largest, t);
  }
  if (num_rows != 1) {
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t x = 0; x < width; ++x) scores[row * width + x] += rel_h[row];
    }
    // The last tile may hold fewer rows than rel_w is made for.
    for (int64_t key = num_rows * width; key < stride; ++key) scores[key] = -INFINITY;
    largest = broadcast(-INFINITY);
    for (int64_t key = 0; key < stride; key += kLanes) largest = maximum(largest, load(scores + key));
  }
  const float next = std::max(maximum_so_far, reduce_max(largest) + rel);
  const float shrink = std::exp2(maximum_so_far - next);
  const Vec shift = broadcast(rel - next);
  Vec total = {};
  for (int64_t key = 0; key < stride; key += kLanes) {
    const Vec p = exp2(load(scores + key) + shift);
    store(probabilities + key, p);
    total += p;
  }
  sum = sum * shrink + reduce_add(total);
  maximum_so_far = next;
  return shrink;
}

template <typename T>
static void attend(const Queries<T>& queries, const PackedGrid<Operand<T>>& packed, const Grid& grid,
                   const GridScratch<T>& scratch) {
  using O = Operand<T>;
  constexpr int kRows = Panel<O>::kRows;
  const int64_t dim = grid.head_dim;
  for (int64_t row = 0; row < queries.count; ++row) {
    O* q = scratch.q.get() + row * scratch.q_stride;
    for (int64_t d = 0; d < dim; ++d) q[d] = convert<O>(queries.q[row][d]);
    for (int64_t d = dim; d < scratch.q_stride; ++d) q[d] = O(0.f);
  }
  relative_positions(queries, packed, grid, scratch);
  std::memset(scratch.out.get(), 0, kBlockRows * scratch.out_stride * sizeof(float));
  float maxima[kBlockRows], sums[kBlockRows] = {}, shrinks[kRows];
  std::fill(maxima, maxima + kBlockRows, -INFINITY);
  const float scale = kLog2E / std::sqrt(static_cast<float>(dim));
  for (int64_t tile = 0; tile < grid.num_tiles(); ++tile) {
    const int64_t top = tile * grid.rows_per_tile(), num_rows = std::min(grid.rows_per_tile(), grid.height - top);
    const int64_t keys = num_rows * grid.width, stride = padded_cols<O>(keys);
    for (int64_t first = 0; first < queries.count; first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, queries.count - first);
      multiply(scratch.q.get() + first * scratch.q_stride, scratch.q_stride,
               packed.keys + tile * packed_keys_size<O>(grid), rows, keys, scratch.q_stride, nullptr,
               scratch.scores.get(), scratch.tile_stride);
      for (int64_t row = 0; row < rows; ++row) {
        shrinks[row] = softmax_tile(
            scratch.scores.get() + row * scratch.tile_stride, scratch.rel_w.get() + (first + row) * scratch.tile_stride,
            scratch.rel_h.get() + (first + row) * grid.height + top, num_rows, grid.width, stride, scale,
            scratch.probabilities.get() + row * scratch.tile_stride, maxima[first + row], sums[first + row]);
      }
      multiply(scratch.probabilities.get(), scratch.tile_stride, packed.values + tile * packed_values_size<O>(grid),
               rows, dim, padded_depth<O>(keys), shrinks, scratch.out.get() + first * scratch.out_stride,
               scratch.out_stride);
    }
  }
  for (int64_t row = 0; row < queries.count; ++row) {
    const float* out = scratch.out.get() + row * scratch.out_stride;
    for (int64_t d = 0; d < dim; ++d) queries.out[row][d] = convert<T>(out[d] / sums[row]);
    *queries.lse[row] = (maxima[row] + std::log2(sums[row])) * kLn2;
  }
}

}  // namespace vlcore::VLCORE_LEVEL
