// The forward of grid_attention.h, which is read first. Read once per level.
namespace vlcore::VLCORE_LEVEL {

// A block of queries on its way through the keys: weighted values, and by lanes the sums of the softmax relative to
// `maxima`, which rel_h has been lowered by.
template <typename T>
class ForwardBlock : public QueryBlock<T> {
 public:
  using O = Operand<T>;
  using Base = QueryBlock<T>;
  static constexpr int kRows = Base::kRows;

  explicit ForwardBlock(const Grid& grid)
      : Base(grid),
        out(kBlockRows * Base::out_stride),
        sums(kBlockRows * kLanes),
        probabilities(kRows * Panel<O>::kWidth) {}

  void start() {
    std::memset(out.get(), 0, Base::rows * Base::out_stride * sizeof(float));
    std::memset(sums.get(), 0, Base::rows * kLanes * sizeof(float));
    std::fill(maxima, maxima + Base::rows, 0.f);
  }

  // Makes what `largest` holds, by lanes, the maxima of a group. What was summed before shrinks accordingly; in
  // the first panel nothing was.
  void raise_maxima(int64_t first, bool is_first_panel, const Vec (&largest)[kRows]) {
    for (int64_t row = first; row < first + kRows; ++row) {
      const float rise = reduce_max(largest[row - first]);
      if (!std::isfinite(rise) || (rise <= 0.f && !is_first_panel)) continue;
      maxima[row] += rise;
      for (int64_t y = 0; y < Base::grid.height; ++y) Base::rel_h.get()[row * Base::grid.height + y] -= rise;
      if (is_first_panel) continue;
      const float shrink = std::exp(-rise / kLogUnit<O>);
      store(sums.get() + row * kLanes, load(sums.get() + row * kLanes) * shrink);
      for (int64_t d = 0; d < Base::out_stride; ++d) out.get()[row * Base::out_stride + d] *= shrink;
    }
  }

  const Scratch<float> out, sums;
  const Scratch<O> probabilities;
  float maxima[kBlockRows];
};

// The maxima of a softmax rise only where a score is larger by this: larger probabilities are as accurate.
constexpr float kHeadroom = 8.f;

// kRows queries and a panel of keys: what their scores weigh is added to the sums and, times the values, to `out`.
template <int kVecs, typename T>
static void attend_group(ForwardBlock<T>& block, int64_t first, const Operand<T>* keys, const Operand<T>* values,
                         const Places<Operand<T>>& places, bool is_first_panel) {
  using O = Operand<T>;
  constexpr int kRows = Panel<O>::kRows;
  const float* rel_h = block.rel_h.get() + first * block.grid.height;
  O* probabilities = block.probabilities.get();
  Vec t[kRows][kVecs], largest[kRows], weights[kRows];
  score(block, first, keys, places, t);
  const auto with_rel_h = [&](int row, int vec) VLCORE_INLINED {
    return t[row][vec] + rel_h[row * block.grid.height + places.y[vec]];
  };
  // The first panel is looked through for the maxima first. Any other is weighed by those that are known, and once
  // more where they are too small.
  for (int pass = is_first_panel ? 0 : 1; pass < 3; ++pass) {
    Vec largest_of_all = broadcast(-INFINITY);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      largest[row] = with_rel_h(row, 0);
#pragma GCC unroll 4
      for (int vec = 1; vec < kVecs; ++vec) largest[row] = maximum(largest[row], with_rel_h(row, vec));
      largest_of_all = maximum(largest_of_all, largest[row]);
      if (pass == 0) continue;
      Vec p[kVecs], sum = {};
#pragma GCC unroll 4
      for (int vec = 0; vec < kVecs; ++vec) {
        p[vec] = exp_of_score<O>(with_rel_h(row, vec));
        sum += p[vec];
      }
      weights[row] = sum;
      store_operands(probabilities + row * Panel<O>::kWidth, p);
      if constexpr (padded_depth<O>(kVecs * kLanes) > kVecs * kLanes) {
        store(probabilities + row * Panel<O>::kWidth + kVecs * kLanes, Vec{});
      }
    }
    if (pass > 0 && !(reduce_max(largest_of_all) > kHeadroom)) break;
    block.raise_maxima(first, is_first_panel, largest);
  }
  float* sums = block.sums.get() + first * kLanes;
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) store(sums + row * kLanes, load(sums + row * kLanes) + weights[row]);
  multiply_rows<kRows>(probabilities, Panel<O>::kWidth, Panel<O>::kGrain, values, block.grid.head_dim,
                       padded_depth<O>(kVecs * kLanes), block.ones.get(), block.out.get() + first * block.out_stride,
                       block.out_stride);
}

// Up to kBlockRows queries attend to all keys.
template <typename T>
static void attend(const Query<T>* queries, int64_t count, const PackedLanes<Operand<T>>& keys,
                   const PackedLanes<Operand<T>>& values, const PackedTable<Operand<T>>& table_h,
                   const PackedTable<Operand<T>>& table_w, ForwardBlock<T>& block) {
  block.load_queries(queries, count, table_h, table_w);
  block.start();
  for (int64_t panel = 0; panel < keys.num_panels; ++panel) {
    const Places<Operand<T>> places(block.grid, panel);
    for_num_vecs(places, [&](auto num_vecs) {
      for (int64_t first = 0; first < block.rows; first += block.kRows) {
        attend_group<num_vecs>(block, first, keys.columns(panel), values.rows(panel), places, panel == 0);
      }
    });
  }
  for (int64_t row = 0; row < count; ++row) {
    const float sum = reduce_add(load(block.sums.get() + row * kLanes));
    const float* out = block.out.get() + row * block.out_stride;
    for (int64_t d = 0; d < block.grid.head_dim; ++d) queries[row].out[d] = convert<T>(out[d] / sum);
    queries[row].statistics[0] = block.maxima[row];
    queries[row].statistics[1] = sum;
  }
}

}  // namespace vlcore::VLCORE_LEVEL
