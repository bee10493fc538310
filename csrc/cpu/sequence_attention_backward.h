// The backward of sequence attention: blocks of keys meet panels of queries, and scores are computed again transposed,
// so that what belongs to a query stands in vectors. Read once per level.
//
// With P the probabilities and D = rowsum(grad_out * out): dV = P^T dO, dS = P * (dO V^T - D), dQ = scale * dS K and
// dK = scale * dS^T Q, all turned back by their positions.
namespace vlcore::VLCORE_LEVEL {

// A multiple of every Panel::kRows and Panel::kDepth.
constexpr int64_t kBlockKeys = 96;
constexpr int64_t kBlockQueries = 64;
// Where a product is added to what is there.
constexpr float kOnes[] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f};

// The tensors of a backward besides those of the call.
template <typename T>
struct Gradients {
  const T *grad_out, *out;
  const float* lse;
  T *grad_q, *grad_k, *grad_v;
};

// What a thread needs: one key head of a sequence, and all queries of one head that sees it.
template <typename T>
class BackwardScratch {
  using O = Operand<T>;
  static constexpr int64_t kKeysAtOnce = Panel<O>::kGrain * kLanes;

 public:
  BackwardScratch(const Attention& call, int64_t longest_queries, int64_t longest_keys)
      : stride(padded_cols<O>(call.head_dim)),
        depth(padded_depth<O>(call.head_dim)),
        keys_stride(round_up(longest_keys + 1, std::max(kKeysAtOnce, kBlockKeys))),
        columns_size(depth * kBlockQueries),
        rows_size(stride * kBlockQueries),
        rows(kBlockQueries * stride),
        keys(keys_stride * stride),
        values(keys_stride * stride),
        keys_transposed(round_up(call.head_dim, kLanes) * keys_stride),
        query_columns(blocks(longest_queries) * columns_size),
        grad_columns(blocks(longest_queries) * columns_size),
        query_rows(blocks(longest_queries) * rows_size),
        grad_rows(blocks(longest_queries) * rows_size),
        probabilities(Panel<O>::kRows * kBlockQueries),
        grad_scores(kBlockKeys * kBlockQueries),
        grad_scores_packed(kBlockKeys * kBlockQueries),
        lse(blocks(longest_queries) * kBlockQueries),
        products(blocks(longest_queries) * kBlockQueries),
        scores(Panel<O>::kRows * kBlockQueries),
        grad_probabilities(Panel<O>::kRows * kBlockQueries),
        grad_keys(keys_stride * stride),
        grad_values(keys_stride * stride),
        grad_queries(blocks(longest_queries) * round_up(call.head_dim, kLanes) * kBlockQueries),
        row(kBlockQueries * round_up(call.head_dim, kLanes)) {}

  static int64_t blocks(int64_t queries) { return (queries + kBlockQueries - 1) / kBlockQueries; }

  const int64_t stride, depth, keys_stride, columns_size, rows_size;
  const Scratch<O> rows, keys, values, keys_transposed, query_columns, grad_columns, query_rows, grad_rows,
      probabilities, grad_scores, grad_scores_packed;
  // lse and D of each query.
  const Scratch<float> lse, products, scores, grad_probabilities, grad_keys, grad_values, grad_queries, row;
  const TileUnit tile_unit;
};

// kBlockQueries rows as panels of columns.
template <typename T>
static void columns_of_block(const BackwardScratch<T>& scratch, Operand<T>* columns) {
  for (int64_t first = 0; first < kBlockQueries; first += Panel<Operand<T>>::kWidth) {
    panel_of_columns(scratch.rows.get() + first * scratch.stride, scratch.stride, scratch.depth,
                     columns + first * scratch.depth);
  }
}

// The product of each of kBlockQueries rows with its column of `columns`, added up in the order of multiply_panel: a
// query that sees one key, whose output is that key's value, then gets no gradient at all, as it should. `spare` has
// room for the rows as columns.
template <typename T>
static void products_with_columns(const BackwardScratch<T>& scratch, const Operand<T>* columns, Operand<T>* spare,
                                  float* products) {
  using O = Operand<T>;
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  if constexpr (kInTiles<O>) {
    for (int64_t first = 0; first < kBlockQueries; first += kLanes) {
      Vec square[Panel<O>::kRows][1];
      multiply_in_registers(scratch.rows.get() + first * scratch.stride, scratch.stride, kGrain,
                            columns + first / kWidth * kWidth * scratch.depth + first % kWidth * kGrain, scratch.depth,
                            square);
      for (int64_t row = 0; row < kLanes; ++row) products[first + row] = square[row][0][row];
    }
    return;
  }
  columns_of_block(scratch, spare);
  for (int64_t first = 0; first < kBlockQueries; first += kLanes) {
    const int64_t panel = first / kWidth * kWidth * scratch.depth;
    Vec sum = {};
    for (int64_t at = panel + first % kWidth * kGrain; at < panel + scratch.depth * kWidth; at += kWidth * kGrain) {
      if constexpr (std::is_same_v<O, float>) {
        sum += load(spare + at) * load(columns + at);
      } else {
#if defined(VLCORE_BF16_DOT)
        sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(spare + at),
                                    (__m512bh)_mm512_loadu_si512(columns + at));
#endif
      }
    }
    store(products + first, sum);
  }
}

// Keys [first, + count) as rows, and transposed; values as rows.
template <typename T>
static void prepare_keys(const Rows<T>& rows, const Sequence& at, int64_t head, int64_t first, int64_t count,
                         const BackwardScratch<T>& scratch) {
  using O = Operand<T>;
  constexpr int kGrain = Panel<O>::kGrain, kWidth = Panel<O>::kWidth;
  rows.fetch(rows.call.k, at.row, at.first_key + first, at.first_key + first + count, head);
  rows.keys(at, head, first, count, scratch.keys.get());
  rows.clear(count, std::max(count + 1, padded_depth<O>(count)), scratch.keys.get());
  rows.fetch(rows.call.v, at.row, at.first_key + first, at.first_key + first + count, head);
  rows.plain(rows.call.v, at.row, at.first_key + first, head, count, scratch.values.get());
  const Scratch<O> pairs(kLanes * kGrain * kWidth);
  for (int64_t key = 0; key < count; key += kLanes * kGrain) {
    for (int64_t col = 0; col < rows.call.head_dim; col += kWidth) {
      panels_of_rows(scratch.keys.get() + key * scratch.stride + col, scratch.stride, kLanes * kGrain, kWidth,
                     pairs.get(), 0);
      transpose_units(pairs.get(), kWidth, std::min<int64_t>(kWidth, rows.call.head_dim - col),
                      scratch.keys_transposed.get() + col * scratch.keys_stride + key, scratch.keys_stride / kGrain);
    }
  }
}

// All queries of a head and their gradients as panels of columns and of rows, and their statistics.
template <typename T>
static void prepare_queries(const Rows<T>& rows, const Gradients<T>& gradients, const Sequence& at, int64_t head,
                            const BackwardScratch<T>& scratch) {
  constexpr int64_t kWidth = Panel<Operand<T>>::kWidth;
  const int64_t dim = rows.call.head_dim;
  auto* from = scratch.rows.get();
  const Heads grad_out = rows.like_queries(gradients.grad_out), out = rows.like_queries(gradients.out);
  for (int64_t block = 0; block < scratch.blocks(at.queries); ++block) {
    const int64_t first = block * kBlockQueries, count = std::min(kBlockQueries, at.queries - first);
    auto* query_columns = scratch.query_columns.get() + block * scratch.columns_size;
    auto* grad_columns = scratch.grad_columns.get() + block * scratch.columns_size;
    const int64_t token = at.first_query + first;
    for (const Heads& tensor : {out, grad_out, rows.call.q}) {
      rows.fetch(tensor, at.row, token + count, at.first_query + std::min(at.queries, first + 2 * kBlockQueries), head);
    }
    rows.clear(count, kBlockQueries, from);
    rows.plain(grad_out, at.row, token, head, count, from);
    columns_of_block(scratch, grad_columns);
    panels_of_rows(from, scratch.stride, kBlockQueries, dim, scratch.grad_rows.get() + block * scratch.rows_size,
                   kBlockQueries * kWidth);
    rows.plain(out, at.row, token, head, count, from);
    products_with_columns(scratch, grad_columns, query_columns, scratch.products.get() + first);
    rows.queries(at, head, first, count, from);
    columns_of_block(scratch, query_columns);
    panels_of_rows(from, scratch.stride, kBlockQueries, dim, scratch.query_rows.get() + block * scratch.rows_size,
                   kBlockQueries * kWidth);
    const float* lse = gradients.lse + (at.row * rows.call.heads + head) * rows.call.queries + at.first_query + first;
    std::copy(lse, lse + count, scratch.lse.get() + first);
    // A column that holds no query has no probabilities.
    std::fill(scratch.lse.get() + first + count, scratch.lse.get() + first + kBlockQueries, INFINITY);
  }
}

// Probabilities of one key and what their gradients make of the scores, by columns of queries.
template <typename O>
VLCORE_INLINE void softmax_gradient(const float* scores, const float* grad_probabilities, const float* lse,
                                    const float* products, int64_t begin, Scaling<O> scaling, O* probabilities,
                                    O* grad_scores) {
  for (int64_t col = 0; col < kBlockQueries; col += kLanes) {
    Vec p = scaling.probability(load(scores + col), load(lse + col));
    if (col < begin) {
      IntVec seen = {};
      for (int lane = 0; lane < kLanes; ++lane) seen[lane] = -(col + lane >= begin);
      p = from_bits(bits_of(p) & seen);
    }
    store(probabilities + col, p);
    store(grad_scores + col, p * (load(grad_probabilities + col) - load(products + col)));
  }
}

// Adds what `count` keys from `key` on, all within a block of keys, and a block of queries give to dV and dK, and
// writes their dS. `begin` is the first query of the block that sees the first of these keys.
template <typename T>
static void meet_keys(int64_t block, int64_t key, int64_t count, int64_t begin, int64_t head_dim,
                      const Scaling<Operand<T>>& scaling, const BackwardScratch<T>& scratch, Operand<T>* grad_scores) {
  using O = Operand<T>;
  constexpr int64_t kWidth = Panel<O>::kWidth;
  const int64_t columns = block * scratch.columns_size, first = block * kBlockQueries;
  multiply(scratch.keys.get() + key * scratch.stride, scratch.stride, scratch.query_columns.get() + columns, count,
           kBlockQueries, scratch.depth, nullptr, scratch.scores.get(), kBlockQueries);
  multiply(scratch.values.get() + key * scratch.stride, scratch.stride, scratch.grad_columns.get() + columns, count,
           kBlockQueries, scratch.depth, nullptr, scratch.grad_probabilities.get(), kBlockQueries);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t at = row * kBlockQueries;
    softmax_gradient(scratch.scores.get() + at, scratch.grad_probabilities.get() + at, scratch.lse.get() + first,
                     scratch.products.get() + first, begin + row, scaling, scratch.probabilities.get() + at,
                     grad_scores + at);
  }
  // Whole tiles of keys are added to, beyond the last one by zeros.
  for (O* rows : {scratch.probabilities.get(), grad_scores}) {
    if (kInTiles<O>) std::fill(rows + count * kBlockQueries, rows + Panel<O>::kRows * kBlockQueries, O(0.f));
  }
  // Queries before the first that sees one of these keys add nothing.
  const int64_t skipped = std::max<int64_t>(begin, 0) / Panel<O>::kDepth * Panel<O>::kDepth;
  const int64_t panels = block * scratch.rows_size + skipped * kWidth, depth = kBlockQueries - skipped;
  multiply_panels(scratch.probabilities.get() + skipped, kBlockQueries, scratch.grad_rows.get() + panels,
                  kBlockQueries * kWidth, count, head_dim, depth, kOnes,
                  scratch.grad_values.get() + key * scratch.stride, scratch.stride);
  multiply_panels(grad_scores + skipped, kBlockQueries, scratch.query_rows.get() + panels, kBlockQueries * kWidth,
                  count, head_dim, depth, kOnes, scratch.grad_keys.get() + key * scratch.stride, scratch.stride);
}

// A block of keys [key, + count), places relative to those that are prepared, meets a block of queries. The first query
// of the block that sees the first key is `begin`: below 0, all queries see it and those behind it; and each key is
// seen by one query fewer than the one before where attention is causal.
template <typename T>
static void meet(int64_t block, int64_t key, int64_t count, int64_t begin, int64_t head_dim,
                 const Scaling<Operand<T>>& scaling, const BackwardScratch<T>& scratch) {
  using O = Operand<T>;
  constexpr int64_t kRows = Panel<O>::kRows;
  O* grad_scores = scratch.grad_scores.get();
  for (int64_t row = 0; row < count; row += kRows) {
    meet_keys(block, key + row, std::min(kRows, count - row), begin + row, head_dim, scaling, scratch,
              grad_scores + row * kBlockQueries);
  }
  const int64_t depth = padded_depth<O>(count);
  std::fill(grad_scores + count * kBlockQueries, grad_scores + depth * kBlockQueries, O(0.f));
  O* packed = scratch.grad_scores_packed.get();
  panels_of_rows(grad_scores, kBlockQueries, depth, kBlockQueries, packed, depth * Panel<O>::kWidth);
  float* grad_queries = scratch.grad_queries.get() + block * round_up(head_dim, kLanes) * kBlockQueries;
  for (int64_t d = 0; d < head_dim; d += kRows) {
    multiply(scratch.keys_transposed.get() + d * scratch.keys_stride + key, scratch.keys_stride, packed,
             std::min(kRows, head_dim - d), kBlockQueries, depth, kOnes, grad_queries + d * kBlockQueries,
             kBlockQueries);
  }
}

// Turns the gradients of a head's queries back to where these came from: to (queries, head_dim), rows to_stride apart.
template <typename T, typename To>
static void write_grad_queries(const Rows<T>& rows, const Sequence& at, const BackwardScratch<T>& scratch, To* to,
                               int64_t to_stride) {
  const Attention& call = rows.call;
  const int64_t padded = round_up(call.head_dim, kLanes);
  for (int64_t first = 0; first < at.queries; first += kBlockQueries) {
    const float* columns = scratch.grad_queries.get() + first * padded;
    for (int64_t d = 0; d < padded; d += kLanes) {
      transpose_units(columns + d * kBlockQueries, kBlockQueries, kBlockQueries, scratch.row.get() + d, padded);
    }
    for (int64_t row = 0; row < std::min(kBlockQueries, at.queries - first); ++row) {
      const int64_t token = at.first_query + first + row;
      rows.tables.turn(scratch.row.get() + row * padded, at.row * call.keys + call.keys - call.queries + token, -1.f,
                       call.scale, call.head_dim, to + (first + row) * to_stride);
    }
  }
}

// One part of the keys of a key head, with all queries that see them. `partial` takes dQ, as grad_q in float32, where
// there are more parts.
template <typename T>
static void attend_part_backward(const Rows<T>& rows, const Gradients<T>& gradients, const Sequence& at,
                                 int64_t kv_head, int64_t begin, int64_t end, const BackwardScratch<T>& scratch,
                                 float* partial) {
  const Attention& call = rows.call;
  const int64_t behind = at.keys - at.queries;
  prepare_keys(rows, at, kv_head, begin, end - begin, scratch);
  std::memset(scratch.grad_keys.get(), 0, (end - begin) * scratch.stride * sizeof(float));
  std::memset(scratch.grad_values.get(), 0, (end - begin) * scratch.stride * sizeof(float));
  for (int64_t member = 0; member < call.group(); ++member) {
    const int64_t head = kv_head * call.group() + member, blocks = scratch.blocks(at.queries);
    prepare_queries(rows, gradients, at, head, scratch);
    const int64_t size = blocks * round_up(call.head_dim, kLanes) * kBlockQueries;
    std::memset(scratch.grad_queries.get(), 0, size * sizeof(float));
    for (int64_t key = begin; key < end; key += kBlockKeys) {
      const int64_t first_block = call.causal ? std::max<int64_t>(key - behind, 0) / kBlockQueries : 0;
      for (int64_t block = first_block; block < blocks; ++block) {
        // The last query of a block sees no key behind it.
        const int64_t last = call.causal ? std::min(at.queries, (block + 1) * kBlockQueries) + behind : at.keys;
        const int64_t count = std::min({kBlockKeys, end - key, last - key});
        const int64_t first_seeing = call.causal ? key - behind - block * kBlockQueries : -kBlockKeys;
        if (count > 0) {
          meet(block, key - begin, count, first_seeing, call.head_dim, rows.scaling, scratch);
        }
      }
    }
    const int64_t to = ((at.row * call.queries + at.first_query) * call.heads + head) * call.head_dim;
    if (partial) {
      write_grad_queries(rows, at, scratch, partial + to, call.heads * call.head_dim);
    } else {
      write_grad_queries(rows, at, scratch, gradients.grad_q + to, call.heads * call.head_dim);
    }
  }
  for (int64_t key = begin; key < end; ++key) {
    const int64_t index = at.row * call.keys + at.first_key + key;
    const int64_t to = (index * call.kv_heads + kv_head) * call.head_dim, from = (key - begin) * scratch.stride;
    rows.tables.turn(scratch.grad_keys.get() + from, index, -1.f, rows.scaling.of_scores, call.head_dim,
                     gradients.grad_k + to);
    RotaryTables::scale_row(scratch.grad_values.get() + from, 1.f, call.head_dim, gradients.grad_v + to);
  }
}

template <typename T>
static void attend_backward(const Attention& call, const Gradients<T>& gradients) {
  const RotaryTables tables(call);
  const Rows<T> rows{call, tables};
  const int64_t longest_keys = call.longest(call.keys), parts = call.parts(longest_keys);
  const int64_t part_keys = (longest_keys + parts - 1) / parts;
  const int64_t size = call.batch * call.queries * call.heads * call.head_dim;
  std::vector<float> partials(parts > 1 ? parts * size : 0);
#pragma omp parallel if (call.parallel())
  {
    const BackwardScratch<T> scratch(call, call.longest(call.queries), part_keys);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < call.sequences * call.kv_heads * parts; ++index) {
      const Sequence at = call.sequence(index / parts / call.kv_heads);
      const int64_t part = index % parts;
      const int64_t begin = std::min(at.keys, part * part_keys), end = std::min(at.keys, begin + part_keys);
      if (begin == end) continue;
      attend_part_backward(rows, gradients, at, index / parts % call.kv_heads, begin, end, scratch,
                           parts > 1 ? partials.data() + part * size : nullptr);
    }
#pragma omp for
    for (int64_t at = 0; at < (parts > 1 ? size : 0); ++at) {
      float sum = 0.f;
      for (int64_t part = 0; part < parts; ++part) sum += partials[part * size + at];
      gradients.grad_q[at] = convert<T>(sum);
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
