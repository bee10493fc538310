// The forward of sequence attention: blocks of queries, tiles of keys, online softmax. Read once per level.
namespace vlcore::VLCORE_LEVEL {

constexpr int64_t kBlockRows = 96;
// A whole number of panels; with fewer keys, the sums and maxima over a row would count for more.
constexpr int64_t kTileKeys = 192;

// One query and one tile of the online softmax: scores become probabilities relative to the running maximum.
// Returns the factor by which what was summed before shrinks.
template <typename O>
VLCORE_INLINE float softmax_row(const float* scores, int64_t cols, Scaling<O> scaling, O* probabilities,
                                float& maximum_so_far, float& sum) {
  Vec largest = load(scores);
  for (int64_t key = kLanes; key < cols; key += kLanes) largest = maximum(largest, load(scores + key));
  const float next = std::max(maximum_so_far, reduce_max(largest) * scaling.of_scores);
  Vec even = {}, odd = {};
  for (int64_t key = 0; key < cols; key += 2 * kLanes) {
    const Vec first = scaling.probability(load(scores + key), next);
    const Vec second = scaling.probability(load(scores + key + kLanes), next);
    store_pair(probabilities + key, first, second);
    even += first, odd += second;
  }
  const float shrink = next == maximum_so_far ? 1.f : std::exp(maximum_so_far - next);
  sum = sum * shrink + reduce_add(even + odd);
  maximum_so_far = next;
  return shrink;
}

// What a thread needs: the keys and values of one head, and a block of queries.
template <typename T>
class ForwardScratch {
  using O = Operand<T>;

 public:
  ForwardScratch(const Attention& call, int64_t longest)
      : stride(padded_cols<O>(call.head_dim)),
        depth(padded_depth<O>(call.head_dim)),
        rows(std::max<int64_t>(kBlockRows, Panel<O>::kWidth) * stride),
        keys(packed_size<O>(call.head_dim, longest)),
        values(packed_size<O>(longest, call.head_dim)),
        probabilities(Panel<O>::kRows * kTileKeys),
        scores(Panel<O>::kRows * kTileKeys),
        out(kBlockRows * stride) {}

  const int64_t stride, depth;
  const Scratch<O> rows, keys, values, probabilities;
  const Scratch<float> scores, out;
  const TileUnit tile_unit;
};

template <typename T>
static void pack_keys_and_values(const Rows<T>& rows, const Sequence& at, int64_t head, int64_t count,
                                 const ForwardScratch<T>& scratch) {
  using O = Operand<T>;
  constexpr int64_t kWidth = Panel<O>::kWidth;
  const auto fetch = [&](int64_t first) {
    const int64_t begin = at.first_key + first, end = at.first_key + std::min(count, first + kWidth);
    rows.fetch(rows.call.k, at.row, begin, end, head);
    rows.fetch(rows.call.v, at.row, begin, end, head);
  };
  fetch(0);
  for (int64_t first = 0; first < count; first += kWidth) {
    fetch(first + kWidth);
    const int64_t present = std::min(kWidth, count - first), depth = padded_depth<O>(present);
    rows.keys(at, head, first, present, scratch.rows.get());
    rows.clear(present, kWidth, scratch.rows.get());
    panel_of_columns(scratch.rows.get(), scratch.stride, scratch.depth, scratch.keys.get() + first * scratch.depth);
    rows.plain(rows.call.v, at.row, at.first_key + first, head, present, scratch.rows.get());
    rows.clear(present, depth, scratch.rows.get());
    panels_of_rows(scratch.rows.get(), scratch.stride, depth, rows.call.head_dim, scratch.values.get() + first * kWidth,
                   padded_depth<O>(count) * kWidth);
  }
}

// Up to Panel::kRows queries of a block: where their rows begin in it, and how far behind its first key they see.
struct QueryRows {
  int64_t first, count, visible;
  bool causal;

  int64_t seen(int64_t row) const { return causal ? visible - (count - 1 - row) : visible; }
};

// Adds `tile_keys` keys from first_key on.
template <typename T>
static void attend_tile(const QueryRows& queries, int64_t first_key, int64_t all_keys, int64_t head_dim,
                        const Scaling<Operand<T>>& scaling, const ForwardScratch<T>& scratch, float* maxima,
                        float* sums) {
  using O = Operand<T>;
  constexpr int64_t kWidth = Panel<O>::kWidth;
  const int64_t keys = std::min(kTileKeys, queries.visible - first_key), cols = padded_cols<O>(keys);
  float* scores = scratch.scores.get();
  O* probabilities = scratch.probabilities.get();
  multiply(scratch.rows.get() + queries.first * scratch.stride, scratch.stride,
           scratch.keys.get() + first_key * scratch.depth, queries.count, keys, scratch.depth, nullptr, scores,
           kTileKeys);
  float shrinks[Panel<O>::kRows];
  std::fill(shrinks + queries.count, shrinks + Panel<O>::kRows, 1.f);
  for (int64_t row = 0; row < queries.count; ++row) {
    const int64_t seen = std::min(keys, std::max<int64_t>(queries.seen(row) - first_key, 0));
    std::fill(scores + row * kTileKeys + seen, scores + row * kTileKeys + cols, -INFINITY);
    shrinks[row] = softmax_row(scores + row * kTileKeys, cols, scaling, probabilities + row * kTileKeys,
                               maxima[queries.first + row], sums[queries.first + row]);
  }
  multiply_panels(probabilities, kTileKeys, scratch.values.get() + first_key * kWidth,
                  padded_depth<O>(all_keys) * kWidth, queries.count, head_dim, padded_depth<O>(keys),
                  first_key ? shrinks : nullptr, scratch.out.get() + queries.first * scratch.stride, scratch.stride);
}

// Queries [first, + count) of one head, count <= kBlockRows, over the packed keys.
template <typename T>
static void attend_block(const Rows<T>& rows, const Sequence& at, int64_t head, int64_t first, int64_t count,
                         int64_t packed_keys, const ForwardScratch<T>& scratch, T* out, float* lse) {
  constexpr int64_t kRows = Panel<Operand<T>>::kRows;
  const Attention& call = rows.call;
  rows.queries(at, head, first, count, scratch.rows.get());
  const int64_t token = at.first_query + first;
  rows.fetch(rows.like_queries(out), at.row, token, token + count, head);
  rows.fetch(call.q, at.row, token + count, at.first_query + std::min(at.queries, first + count + kBlockRows), head);
  float maxima[kBlockRows], sums[kBlockRows] = {};
  std::fill(maxima, maxima + kBlockRows, -INFINITY);
  const int64_t behind = at.keys - at.queries + 1;
  for (int64_t tile = 0; tile < packed_keys; tile += kTileKeys) {
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t rows_here = std::min(kRows, count - row);
      const int64_t visible = call.causal ? first + row + rows_here - 1 + behind : at.keys;
      if (visible <= tile) continue;
      attend_tile({row, rows_here, visible, call.causal}, tile, packed_keys, call.head_dim, rows.scaling, scratch,
                  maxima, sums);
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    const int64_t token = at.first_query + first + row;
    RotaryTables::scale_row(scratch.out.get() + row * scratch.stride, 1.f / sums[row], call.head_dim,
                            out + ((at.row * call.queries + token) * call.heads + head) * call.head_dim);
    lse[(at.row * call.heads + head) * call.queries + token] = maxima[row] + std::log(sums[row]);
  }
}

template <typename T>
static void attend_forward(const Attention& call, T* out, float* lse) {
  const RotaryTables tables(call);
  const Rows<T> rows{call, tables};
  const int64_t longest = call.longest(call.keys), parts = call.parts(call.longest(call.queries));
#pragma omp parallel if (call.parallel())
  {
    const ForwardScratch<T> scratch(call, longest);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < call.sequences * call.kv_heads * parts; ++index) {
      const Sequence at = call.sequence(index / parts / call.kv_heads);
      const int64_t kv_head = index / parts % call.kv_heads, part = index % parts;
      const int64_t begin = at.queries * part / parts, end = at.queries * (part + 1) / parts;
      if (begin == end) continue;
      const int64_t packed_keys = call.causal ? end + at.keys - at.queries : at.keys;
      pack_keys_and_values(rows, at, kv_head, packed_keys, scratch);
      for (int64_t member = 0; member < call.group(); ++member) {
        for (int64_t first = begin; first < end; first += kBlockRows) {
          attend_block(rows, at, kv_head * call.group() + member, first, std::min(kBlockRows, end - first), packed_keys,
                       scratch, out, lse);
        }
      }
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
