// The backward of grid_attention.h: docs/rel_pos_attention.md derives it. Read once per level.
//
// A block of queries goes over all keys and keeps what is its own: grad_q, and the gradients of rel_h and rel_w, which
// become those of the tables. The gradients of keys and values grow in memory, lane by lane.
#include "cpu/grid_sums.h"

namespace vlcore::VLCORE_LEVEL {

// Rows d and d + 1 of one vector of a packed panel.
VLCORE_INLINE void store_packed(float* to, Vec even, Vec odd) {
  store(to, even);
  store(to + Panel<float>::kWidth, odd);
}

#if defined(VLCORE_BF16_DOT)
VLCORE_INLINE void store_packed(bfloat16* to, Vec even, Vec odd) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave, halves));
}
#endif

// Of so few keys, such as a window's, a block's probabilities and the gradients of them are held between the pass that
// sums delta and the one that uses it.
constexpr int64_t kHeldLanes = 512;

// What a block of queries has besides: the gradient of its outputs and of its scores.
template <typename T>
class BackwardBlock : public QueryBlock<T> {
 public:
  using O = Operand<T>;
  using Base = QueryBlock<T>;
  static constexpr int kRows = Base::kRows;
  static constexpr int64_t kWidth = Panel<O>::kWidth;
  static constexpr bool kIsFloat = std::is_same_v<O, float>;

  explicit BackwardBlock(const Grid& grid)
      : Base(grid),
        is_held(grid.lanes() <= kHeldLanes),
        grad_out(kBlockRows * Base::q_stride),
        transposed_q(Base::out_stride * kBlockRows),
        transposed_grad_out(Base::out_stride * kBlockRows),
        probabilities(is_held ? kBlockRows * round_up(grid.lanes(), kWidth) : kRows * kWidth),
        grad_probabilities(is_held ? kBlockRows * round_up(grid.lanes(), kWidth) : 0),
        packed_probabilities(kBlockRows * kWidth),
        grad_scores(kRows * kWidth),
        packed_grad_scores(kBlockRows * kWidth),
        delta(kBlockRows),
        delta_lanes(kBlockRows * kLanes),
        sum_lanes(kBlockRows * kLanes),
        factors(kBlockRows),
        grad_q(kBlockRows * Base::out_stride),
        grad_rel_h(kBlockRows * grid.height),
        grad_rel_w(kBlockRows * Base::w_stride),
        offsets_stride_(padded_depth<O>(2 * std::max(grid.height, grid.width))),
        offsets_(kBlockRows * offsets_stride_),
        packed_offsets_(packed_size<O>(kBlockRows, offsets_stride_)),
        packed_rows_(packed_size<O>(kBlockRows, grid.head_dim)),
        rows_of_out_(kLanes * round_up(Base::q_stride, kWidth)),
        packed_out_(packed_size<O>(grid.head_dim, kLanes)) {}

  void load(const Query<T>* queries, int64_t count, const PackedTable<O>& table_h, const PackedTable<O>& table_w) {
    Base::load_queries(queries, count, table_h, table_w);
    const int64_t dim = Base::grid.head_dim, height = Base::grid.height, rows = Base::rows;
    clear(grad_out, rows * Base::q_stride);
    clear(delta, rows);
    clear(delta_lanes, rows * kLanes);
    clear(sum_lanes, rows * kLanes);
    clear(grad_q, rows * Base::out_stride);
    clear(grad_rel_h, rows * height);
    clear(grad_rel_w, rows * Base::w_stride);
    for (int64_t row = 0; row < count; ++row) {
      const float maximum = queries[row].statistics[0], sum = queries[row].statistics[1];
      // What score() gives becomes a probability by exp: in float32 up to a factor, as the rounding of the sum's
      // logarithm would be seen.
      const float subtracted = kIsFloat ? maximum : maximum + std::log2(sum);
      for (int64_t y = 0; y < height; ++y) Base::rel_h.get()[row * height + y] -= subtracted;
      for (int64_t d = 0; d < dim; ++d) grad_out.get()[row * Base::q_stride + d] = convert<O>(queries[row].grad_out[d]);
    }
    std::fill(factors.get(), factors.get() + rows, 1.f);
    transpose(Base::q, transposed_q);
    transpose(grad_out, transposed_grad_out);
    for (O* panel : {packed_probabilities.get(), packed_grad_scores.get()}) {
      std::fill(panel + rows * kWidth, panel + padded_depth<O>(rows) * kWidth, O(0.f));
    }
  }

  // delta = grad_out . out, by the product that gives grad_out . v: where a softmax has one key they must cancel. Where
  // many keys have one value they must too, and the rounding of `out` would be seen: delta_group corrects it, in
  // bfloat16 only where that costs no product.
  void load_delta(const Query<T>* queries, int64_t count) {
    const int64_t dim = Base::grid.head_dim, stride = Base::q_stride;
    for (int64_t first = 0; first < count; first += kLanes) {
      const int64_t end = std::min(first + kLanes, Base::rows);
      for (int64_t row = first; row < end; ++row) {
        O* to = rows_of_out_.get() + (row - first) * stride;
        for (int64_t d = 0; d < dim; ++d) to[d] = row < count ? convert<O>(queries[row].out[d]) : O(0.f);
      }
      transpose_units(rows_of_out_.get(), stride / Panel<O>::kGrain, stride / Panel<O>::kGrain, packed_out_.get(),
                      kWidth);
      for (int64_t row = first; row < end; row += kRows) {
        float products[kRows * kWidth];
        const int64_t present = std::min<int64_t>(kRows, end - row);
        multiply(grad_out.get() + row * stride, stride, packed_out_.get(), present, kLanes, stride, nullptr, products,
                 kWidth);
        for (int64_t i = 0; i < present; ++i) delta.get()[row + i] = products[i * kWidth + row - first + i];
      }
    }
  }

  // Adds what the queries' places give to grad_q, and to the sum of a table's gradient.
  template <typename Place>
  void add_positions(const float* grad, int64_t stride, const PackedTable<O>& table, float* grad_table, int64_t count,
                     const Place& place) {
    const int64_t rows = Base::rows, dim = Base::grid.head_dim, depth = padded_depth<O>(table.num_offsets);
    clear(offsets_, rows * offsets_stride_);
    for (int64_t row = 0; row < count; ++row) {
      O* to = offsets_.get() + row * offsets_stride_ + table.size - 1 - place(row);
      for (int64_t i = 0; i < table.size; ++i) to[i] = convert<O>(grad[row * stride + i]);
    }
    multiply_all(offsets_.get(), offsets_stride_, table.rows.get(), rows, dim, depth, Base::ones.get(), grad_q.get(),
                 Base::out_stride);
    pack(offsets_.get(), offsets_stride_, rows, table.num_offsets, packed_offsets_.get());
    for (int64_t first = 0; first < table.num_offsets; first += kWidth) {
      add_transposed(transposed_q, packed_offsets_.get() + first * padded_depth<O>(rows),
                     std::min(kWidth, table.num_offsets - first), grad_table + first * Base::out_stride);
    }
  }

  // sums (head_dim, kWidth) += A B for a transposed A (head_dim, rows) and a panel B (rows, cols).
  void add_transposed(const Scratch<O>& a, const O* b, int64_t cols, float* sums) const {
    multiply_all(a.get(), kBlockRows, b, Base::grid.head_dim, cols, padded_depth<O>(Base::rows), Base::ones.get(), sums,
                 kWidth);
  }

  // Where the group of queries from `first` on has its part of a panel, (kRows, kWidth).
  int64_t held_at(int64_t panel, int64_t first) const { return is_held ? (panel * kBlockRows + first) * kWidth : 0; }

  const bool is_held;
  const Scratch<O> grad_out, transposed_q, transposed_grad_out;
  const Scratch<float> probabilities, grad_probabilities;
  const Scratch<O> packed_probabilities, grad_scores, packed_grad_scores;
  const Scratch<float> delta, delta_lanes, sum_lanes, factors, grad_q, grad_rel_h, grad_rel_w;

 private:
  template <typename Element>
  static void clear(const Scratch<Element>& scratch, int64_t size) {
    std::memset(static_cast<void*>(scratch.get()), 0, size * sizeof(Element));
  }

  // to (head_dim, kBlockRows) is the block's rows of `from` (rows, q_stride), by pairs of rows where these stand side
  // by side in a panel.
  void transpose(const Scratch<O>& from, const Scratch<O>& to) {
    constexpr int64_t kGrain = Panel<O>::kGrain;
    const int64_t depth = padded_depth<O>(Base::rows), dim = Base::grid.head_dim;
    pack(from.get(), Base::q_stride, Base::rows, dim, packed_rows_.get());
    for (int64_t d = 0; d < dim; d += kWidth) {
      for (int64_t row = 0; row < depth; row += kLanes * kGrain) {
        transpose_units(packed_rows_.get() + d * depth + row * kWidth, kWidth, std::min(kWidth, dim - d),
                        to.get() + d * kBlockRows + row, kBlockRows / kGrain);
      }
    }
  }

  const int64_t offsets_stride_;
  const Scratch<O> offsets_, packed_offsets_, packed_rows_, rows_of_out_, packed_out_;
};

// Probabilities of kRows queries and a panel of keys, up to the rows' factors, and grad_out v^T.
template <int kVecs, typename T, int kRows>
VLCORE_INLINE void probabilities_and_gradients(const BackwardBlock<T>& block, int64_t first, const Operand<T>* keys,
                                               const Operand<T>* values, const Places<Operand<T>>& places,
                                               float* probabilities, Vec (&grad)[kRows][kVecs]) {
  using O = Operand<T>;
  const Scores<T> score(block, first, places);
  multiply_keys(block, first, keys, grad);
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      store(probabilities + row * Panel<O>::kWidth + vec * kLanes, exp_of_score<O>(score(grad[row][vec], row, vec)));
    }
  }
  multiply_in_registers(block.grad_out.get() + first * block.q_stride, block.q_stride, Panel<O>::kGrain, values,
                        block.q_stride, grad);
}

// Adds a panel's part of the sums of p and of p * (grad_out v^T - delta), by lanes.
template <int kVecs, typename T>
static void delta_group(BackwardBlock<T>& block, int64_t panel, int64_t first, const Operand<T>* keys,
                        const Operand<T>* values, const Places<Operand<T>>& places) {
  constexpr int kRows = Panel<Operand<T>>::kRows, kWidth = Panel<Operand<T>>::kWidth;
  float* probabilities = block.probabilities.get() + block.held_at(panel, first);
  float* held = block.grad_probabilities.get() + block.held_at(panel, first);
  Vec grad[kRows][kVecs];
  probabilities_and_gradients(block, first, keys, values, places, probabilities, grad);
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    Vec sum = {}, products = {};
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      const Vec p = load(probabilities + row * kWidth + vec * kLanes);
      if (block.is_held) store(held + row * kWidth + vec * kLanes, grad[row][vec]);
      sum += p;
      products += p * (grad[row][vec] - block.delta.get()[first + row]);
    }
    float* sums = block.sum_lanes.get() + (first + row) * kLanes;
    float* deltas = block.delta_lanes.get() + (first + row) * kLanes;
    store(sums, load(sums) + sum);
    store(deltas, load(deltas) + products);
  }
}

// kRows queries and a panel of keys: their probabilities p, and the gradient of their scores p * (grad_out v^T -
// delta).
template <int kVecs, typename T>
static void backward_group(BackwardBlock<T>& block, int64_t panel, int64_t first, const PackedLanes<Operand<T>>& keys,
                           const Operand<T>* values, const Places<Operand<T>>& places) {
  using O = Operand<T>;
  constexpr int kRows = Panel<O>::kRows, kWidth = Panel<O>::kWidth, kGrain = Panel<O>::kGrain;
  float* probabilities = block.probabilities.get() + block.held_at(panel, first);
  const float* held = block.grad_probabilities.get() + block.held_at(panel, first);
  const float *factors = block.factors.get() + first, *delta = block.delta.get() + first;
  Vec grad[kRows][kVecs];
  if (block.is_held) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int vec = 0; vec < kVecs; ++vec) grad[row][vec] = load(held + row * kWidth + vec * kLanes);
    }
  } else {
    probabilities_and_gradients(block, first, keys.columns(panel), values, places, probabilities, grad);
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; row += 2) {
    O* packed_p = block.packed_probabilities.get() + (first + row) * kWidth;
    O* packed_grad = block.packed_grad_scores.get() + (first + row) * kWidth;
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      const float* at = probabilities + row * kWidth + vec * kLanes;
      const Vec even = load(at) * factors[row], odd = load(at + kWidth) * factors[row + 1];
      grad[row][vec] = even * (grad[row][vec] - delta[row]);
      grad[row + 1][vec] = odd * (grad[row + 1][vec] - delta[row + 1]);
      store_packed(packed_p + vec * kLanes * kGrain, even, odd);
      store_packed(packed_grad + vec * kLanes * kGrain, grad[row][vec], grad[row + 1][vec]);
    }
  }
  const bool is_one_image_row = places.y[0] == places.y[kVecs - 1];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    store_operands(block.grad_scores.get() + row * kWidth, grad[row]);
    float* grad_rel_w = block.grad_rel_w.get() + (first + row) * block.w_stride;
    float* grad_rel_h = block.grad_rel_h.get() + (first + row) * block.grid.height;
    Vec sum = {};
#pragma GCC unroll 4
    for (int vec = 0; vec < kVecs; ++vec) {
      store(grad_rel_w + places.x[vec], load(grad_rel_w + places.x[vec]) + grad[row][vec]);
      if (!is_one_image_row) grad_rel_h[places.y[vec]] += reduce_add(grad[row][vec]);
      sum += grad[row][vec];
    }
    if (is_one_image_row) grad_rel_h[places.y[0]] += reduce_add(sum);
  }
  multiply_panels(block.grad_scores.get(), kWidth, keys.rows(panel * kWidth), keys.rows_size, kRows,
                  block.grid.head_dim, padded_depth<O>(kVecs * kLanes), block.ones.get(),
                  block.grad_q.get() + first * block.out_stride, block.out_stride);
}

// The gradients of up to kBlockRows queries, and what they add to the sums. Keys need columns and rows, values columns.
template <typename T>
static void attend_backward(const Query<T>* queries, int64_t count, const PackedLanes<Operand<T>>& keys,
                            const PackedLanes<Operand<T>>& values, const PackedTable<Operand<T>>& table_h,
                            const PackedTable<Operand<T>>& table_w, BackwardBlock<T>& block,
                            const GridSums<Operand<T>>& sums) {
  block.load(queries, count, table_h, table_w);
  block.load_delta(queries, count);
  if (BackwardBlock<T>::kIsFloat || block.is_held) {
    for (int64_t panel = 0; panel < keys.num_panels; ++panel) {
      const Places<Operand<T>> places(block.grid, panel);
      for_num_vecs(places, [&](auto num_vecs) {
        for (int64_t first = 0; first < block.rows; first += block.kRows) {
          delta_group<num_vecs>(block, panel, first, keys.columns(panel), values.columns(panel), places);
        }
      });
    }
    for (int64_t row = 0; row < count; ++row) {
      const float sum = reduce_add(load(block.sum_lanes.get() + row * kLanes));
      block.factors.get()[row] = 1.f / sum;
      block.delta.get()[row] += reduce_add(load(block.delta_lanes.get() + row * kLanes)) / sum;
    }
  }
  for (int64_t panel = 0; panel < keys.num_panels; ++panel) {
    const Places<Operand<T>> places(block.grid, panel);
    for_num_vecs(places, [&](auto num_vecs) {
      for (int64_t first = 0; first < block.rows; first += block.kRows) {
        backward_group<num_vecs>(block, panel, first, keys, values.columns(panel), places);
      }
    });
    const int64_t lanes = places.num_vecs * kLanes, at = panel * block.kWidth * sums.stride;
    block.add_transposed(block.transposed_grad_out, block.packed_probabilities.get(), lanes, sums.values + at);
    block.add_transposed(block.transposed_q, block.packed_grad_scores.get(), lanes, sums.keys + at);
  }
  // The scale of the scores is not that of what positions add.
  for (int64_t i = 0; i < block.rows * block.out_stride; ++i) block.grad_q.get()[i] *= block.grid.scale();
  // What is added to all scores alike the softmax does not see: one row, or one column, has no gradient.
  if (block.grid.height > 1) {
    block.add_positions(block.grad_rel_h.get(), block.grid.height, table_h, sums.table_h, count,
                        [&](int64_t row) { return queries[row].y; });
  }
  if (block.grid.width > 1) {
    block.add_positions(block.grad_rel_w.get(), block.w_stride, table_w, sums.table_w, count,
                        [&](int64_t row) { return queries[row].x; });
  }
  for (int64_t row = 0; row < count; ++row) {
    const float* grad_q = block.grad_q.get() + row * block.out_stride;
    for (int64_t d = 0; d < block.grid.head_dim; ++d) queries[row].grad_q[d] = convert<T>(grad_q[d]);
  }
}

}  // namespace vlcore::VLCORE_LEVEL
