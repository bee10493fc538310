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
  // Of a row of probabilities.
  static constexpr int64_t kStride = (kInTiles<O> ? 4 : 1) * Panel<O>::kWidth;

  explicit ForwardBlock(const Grid& grid)
      : Base(grid), out(kBlockRows * Base::out_stride), sums(kBlockRows * kLanes), probabilities(kRows * kStride) {}

  void start() {
    std::memset(out.get(), 0, Base::rows * Base::out_stride * sizeof(float));
    std::memset(sums.get(), 0, Base::rows * kLanes * sizeof(float));
    std::fill(maxima, maxima + Base::rows, 0.f);
  }

  // Raises the maximum of a query. What was summed before shrinks accordingly; before the first panel nothing was.
  void raise_maximum(int64_t row, bool is_first_panel, float rise) {
    if (!std::isfinite(rise) || (rise <= 0.f && !is_first_panel)) return;
    maxima[row] += rise;
    for (int64_t y = 0; y < Base::grid.height; ++y) Base::rel_h.get()[row * Base::grid.height + y] -= rise;
    if (is_first_panel) return;
    const float shrink = std::exp(-rise / kLogUnit<O>);
    store(sums.get() + row * kLanes, load(sums.get() + row * kLanes) * shrink);
    for (int64_t d = 0; d < Base::out_stride; ++d) out.get()[row * Base::out_stride + d] *= shrink;
  }

  const Scratch<float> out, sums;
  const Scratch<O> probabilities;
  float maxima[kBlockRows];
};

// The maxima of a softmax rise only where they have to: larger weights are as accurate. In bfloat16 it is asked after
// them, whether a lane's of one panel sum up to more than this: they saturate at infinity. In float32 scores are asked,
// as exp() is none above 88.
template <typename O>
constexpr bool kAsksWeights = std::is_same_v<O, bfloat16>;
template <typename O>
constexpr float kMost = kAsksWeights<O> ? 256.f : 8.f;

// From the products of kRows queries and a panel of keys to what these weigh, (kRows, stride), which is added to the
// sums. before_raise() is called before maxima rise for a second time.
template <int kVecs, typename T, int kRows, typename BeforeRaise>
VLCORE_INLINE void weigh(ForwardBlock<T>& block, int64_t first, const Vec (&products)[kRows][kVecs],
                         const Places<Operand<T>>& places, bool is_first_panel, Operand<T>* probabilities,
                         int64_t stride, const BeforeRaise& before_raise) {
  using O = Operand<T>;
  const Scores<T> score(block, first, places);
  float* sums = block.sums.get() + first * kLanes;
  Vec weights[kRows];
  for (bool again = false;; again = true) {
    if (again) before_raise();
    if (again || is_first_panel) {
      for (int row = 0; row < kRows; ++row) {
        Vec largest = score(products[row][0], row, 0);
        for (int vec = 1; vec < kVecs; ++vec) largest = maximum(largest, score(products[row][vec], row, vec));
        block.raise_maximum(first + row, is_first_panel, reduce_max(largest));
      }
    }
    Vec most = broadcast(-INFINITY);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      Vec p[kVecs], sum = {};
#pragma GCC unroll 4
      for (int vec = 0; vec < kVecs; ++vec) {
        const Vec t = score(products[row][vec], row, vec);
        if constexpr (!kAsksWeights<O>) most = maximum(most, t);
        p[vec] = exp_of_score<O>(t);
        sum += p[vec];
      }
      store_operands(probabilities + row * stride, p);
      weights[row] = sum;
      if constexpr (kAsksWeights<O>) most = maximum(most, sum);
    }
    if (again || !(reduce_max(most) > kMost<O>)) break;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) store(sums + row * kLanes, load(sums + row * kLanes) + weights[row]);
}

// A group of queries goes over all keys in tiles. Several panels are weighed before their values are added: `out` is
// loaded and stored the less often.
template <typename T>
static void attend_in_tiles(ForwardBlock<T>& block, int64_t first, const PackedLanes<Operand<T>>& keys,
                            const PackedLanes<Operand<T>>& values) {
  using O = Operand<T>;
  constexpr int64_t kStride = ForwardBlock<T>::kStride;
  // Lanes [added, weighed) wait for their values.
  int64_t added = 0, weighed = 0;
  const auto add_values = [&] {
    if (added == weighed) return;
    multiply_panels(block.probabilities.get() + added % kStride, kStride, values.rows(added), values.rows_size,
                    Panel<O>::kRows, block.grid.head_dim, weighed - added, block.ones.get(),
                    block.out.get() + first * block.out_stride, block.out_stride);
    added = weighed;
  };
  for (int64_t panel = 0; panel < keys.num_panels; ++panel) {
    const Places<O> places(block.grid, panel);
    for_num_vecs(places, [&](auto num_vecs) {
      Vec products[Panel<O>::kRows][num_vecs];
      multiply_keys(block, first, keys.columns(panel), products);
      weigh(block, first, products, places, panel == 0, block.probabilities.get() + weighed % kStride, kStride,
            add_values);
      weighed += padded_depth<O>(num_vecs * kLanes);
    });
    if (weighed % kStride == 0) add_values();
  }
  add_values();
}

// Groups of queries and a panel of keys in registers.
template <int kVecs, typename T>
static void attend_panel(ForwardBlock<T>& block, const Operand<T>* keys, const PackedLanes<Operand<T>>& values,
                         const Places<Operand<T>>& places, int64_t panel) {
  using O = Operand<T>;
  constexpr int64_t kRows = Panel<O>::kRows, kStride = ForwardBlock<T>::kStride;
  O* probabilities = block.probabilities.get();
  for (int64_t first = 0; first < block.rows; first += kRows) {
    Vec products[kRows][kVecs];
    multiply_keys(block, first, keys, products);
    weigh(block, first, products, places, panel == 0, probabilities, kStride, [] {});
    multiply_panels(probabilities, kStride, values.rows(panel * Panel<O>::kWidth), values.rows_size, kRows,
                    block.grid.head_dim, kVecs * kLanes, block.ones.get(), block.out.get() + first * block.out_stride,
                    block.out_stride);
  }
}

// Up to kBlockRows queries attend to all keys.
template <typename T>
static void attend(const Query<T>* queries, int64_t count, const PackedLanes<Operand<T>>& keys,
                   const PackedLanes<Operand<T>>& values, const PackedTable<Operand<T>>& table_h,
                   const PackedTable<Operand<T>>& table_w, ForwardBlock<T>& block) {
  using O = Operand<T>;
  block.load_queries(queries, count, table_h, table_w);
  block.start();
  if constexpr (kInTiles<O>) {
    for (int64_t first = 0; first < block.rows; first += block.kRows) attend_in_tiles(block, first, keys, values);
  } else {
    for (int64_t panel = 0; panel < keys.num_panels; ++panel) {
      const Places<O> places(block.grid, panel);
      for_num_vecs(places,
                   [&](auto num_vecs) { attend_panel<num_vecs>(block, keys.columns(panel), values, places, panel); });
    }
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
