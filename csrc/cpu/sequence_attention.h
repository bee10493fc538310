// Attention of token sequences, for its forward and backward: what is attended to, and how it is packed for tile.h.
// Read once per level.
#include "cpu/panels.h"
#include "cpu/rotary.h"

namespace vlcore::VLCORE_LEVEL {

// Work is split into parts that depend on the shapes alone, so that sums do not depend on the number of threads: about
// kWantedParts where there are few heads, each of at least kTokensOfPart tokens.
constexpr int64_t kWantedParts = 16;
constexpr int64_t kTokensOfPart = 256;
// Below this number of scores times head_dim, waking a thread costs more than it brings.
constexpr int64_t kParallelWork = 1 << 18;

// Queries [first_query, + queries) of a row of the batch attend to its keys [first_key, + keys).
struct Sequence {
  int64_t row, first_query, queries, first_key, keys;
};

// One call of the operator; for the tensors see attention_forward in kernels.h.
struct Attention {
  Heads q, k, v;
  const int64_t* positions;
  const int32_t* bounds;
  int64_t batch, queries, keys, heads, kv_heads, head_dim, sequences;
  double theta;
  bool causal;
  float scale;

  int64_t group() const { return heads / std::max<int64_t>(kv_heads, 1); }
  bool parallel() const {
    const int64_t times = bounds ? std::max<int64_t>(sequences, 1) : 1;
    return batch * heads * queries * keys / times * head_dim >= kParallelWork;
  }
  // Parts of a sequence's queries or keys.
  int64_t parts(int64_t tokens) const {
    const int64_t wanted = (kWantedParts + sequences * kv_heads - 1) / std::max<int64_t>(sequences * kv_heads, 1);
    return std::min(wanted, std::max<int64_t>(tokens / kTokensOfPart, 1));
  }
  Sequence sequence(int64_t index) const {
    if (!bounds) return {index, 0, queries, 0, keys};
    const int64_t first = bounds[index], count = bounds[index + 1] - first;
    return {0, first, count, first, count};
  }
  int64_t longest(int64_t tokens) const {
    int64_t most = bounds ? 0 : tokens;
    for (int64_t index = 0; bounds && index < sequences; ++index) most = std::max(most, sequence(index).keys);
    return most;
  }
};

// Cosines and sines of all positions, or nothing where there is no rotation.
class RotaryTables {
 public:
  explicit RotaryTables(const Attention& call)
      : half_(call.head_dim / 2), tables_(call.positions ? 2 * call.batch * call.keys * half_ : 0) {
    if (!call.positions) return;
    const std::vector<float> frequencies = rotary_frequencies(call.theta, call.head_dim);
#pragma omp parallel for if (call.parallel())
    for (int64_t index = 0; index < call.batch * call.keys; ++index) {
      float* to = tables_.data() + 2 * index * half_;
      rotary_angles(call.positions[index], frequencies, to, to + half_);
    }
  }

  // to (2 * half) = factor * from, turned by the position at `index` of (batch * keys), or turned back.
  template <typename T, typename O>
  void turn(const T* from, int64_t index, float direction, float factor, int64_t size, O* to) const {
    if (!tables_.empty()) {
      const float* cosines = tables_.data() + 2 * index * half_;
      rotate(from, cosines, cosines + half_, half_, direction, factor, to);
    } else {
      scale_row(from, factor, size, to);
    }
  }

  template <typename T, typename O>
  static void scale_row(const T* from, float factor, int64_t size, O* to) {
    for_vecs(size,
             [&](int64_t at, auto lanes) VLCORE_INLINED { store(to + at, load(from + at, lanes) * factor, lanes); });
  }

 private:
  int64_t half_;
  std::vector<float> tables_;
};

template <typename T>
VLCORE_INLINE const T* row_of(const Heads& tensor, int64_t row, int64_t token, int64_t head) {
  return static_cast<const T*>(tensor.data) + row * tensor.batch_stride + token * tensor.token_stride +
         head * tensor.head_stride;
}

// Scores are kept in natural units. In float32 the scale goes into the queries, so that a query that sees one key finds
// in its backward the very score that is its lse; bfloat16 queries would lose by it, and take the
// scale only where it is not positive, as maxima are sought before it.
template <typename O>
struct Scaling {
  explicit Scaling(float scale)
      : of_queries(!std::is_same_v<O, float> && scale > 0.f ? 1.f : scale),
        of_scores(!std::is_same_v<O, float> && scale > 0.f ? scale : 1.f) {}

  // e^(scaled score - shift); to 8e-5 of it where it is rounded to bfloat16.
  template <typename Shift>
  Vec probability(Vec scores, Shift shift) const {
#if defined(VLCORE_BF16_DOT)
    if constexpr (std::is_same_v<O, bfloat16>) {
      const Vec x = scores * (of_scores * kLog2E) - shift * kLog2E;
      const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, 0x09);
      Vec p = broadcast(7.802452118e-2f);
      p = p * fraction + 2.260671575e-1f;
      p = p * fraction + 6.958335398e-1f;
      p = p * fraction + 9.999252186e-1f;
      return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
    }
#endif
    return exp(scores - shift);
  }

  const float of_queries, of_scores;
};

template <typename O>
VLCORE_INLINE void store_pair(O* to, Vec first, Vec second) {
#if defined(VLCORE_BF16_DOT)
  if constexpr (std::is_same_v<O, bfloat16>) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    std::memcpy(static_cast<void*>(to), &both, sizeof both);
    return;
  }
#endif
  store(to, first);
  store(to + kLanes, second);
}

// Rows of heads are brought to matrices of operands, whose rows are as long as whole panels and end in zeros.
template <typename T>
struct Rows {
  using O = Operand<T>;
  const Attention& call;
  const RotaryTables& tables;
  const Scaling<O> scaling{call.scale};
  const int64_t stride = padded_cols<O>(call.head_dim);

  void queries(const Sequence& at, int64_t head, int64_t first, int64_t count, O* to) const {
    const int64_t behind = call.keys - call.queries;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t token = at.first_query + first + row;
      tables.turn(row_of<T>(call.q, at.row, token, head), at.row * call.keys + behind + token, 1.f, scaling.of_queries,
                  call.head_dim, to + row * stride);
    }
  }
  void keys(const Sequence& at, int64_t head, int64_t first, int64_t count, O* to) const {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t token = at.first_key + first + row;
      tables.turn(row_of<T>(call.k, at.row, token, head), at.row * call.keys + token, 1.f, 1.f, call.head_dim,
                  to + row * stride);
    }
  }
  // Asks for the rows of tokens [first, end) before they are needed: they lie so far apart, often on pages of their
  // own, that the processor does not foresee them.
  void fetch(const Heads& tensor, int64_t batch_row, int64_t first, int64_t end, int64_t head) const {
    for (int64_t token = first; token < end; ++token) {
      const char* row = reinterpret_cast<const char*>(row_of<T>(tensor, batch_row, token, head));
      for (int64_t at = 0; at < call.head_dim * int64_t{sizeof(T)}; at += 64) __builtin_prefetch(row + at);
    }
  }
  // Without rotation.
  void plain(const Heads& tensor, int64_t batch_row, int64_t first, int64_t head, int64_t count, O* to) const {
    for (int64_t row = 0; row < count; ++row) {
      RotaryTables::scale_row(row_of<T>(tensor, batch_row, first + row, head), 1.f, call.head_dim, to + row * stride);
    }
  }
  Heads like_queries(const T* contiguous) const {
    return {contiguous, call.queries * call.heads * call.head_dim, call.heads * call.head_dim, call.head_dim};
  }
  void clear(int64_t first, int64_t end, O* to) const {
    if (first < end) std::memset(static_cast<void*>(to + first * stride), 0, (end - first) * stride * sizeof(O));
  }
};

}  // namespace vlcore::VLCORE_LEVEL
