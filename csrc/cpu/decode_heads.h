// Attention of one token a row over the caches, in pieces that threads share. Read once per level.
#include "cpu/rotary.h"

namespace vlcore::VLCORE_LEVEL {

// A row's keys are split into parts that depend on its length alone, so that sums depend neither on the number of
// threads nor on the other rows. Their number is even, for two threads to share alike.
constexpr int64_t kKeysOfPart = 64;
// Tokens of the cache that are read together: what is read of q, and read and written of the sums, serves them all.
constexpr int kTogether = 4;

struct DecodeShape {
  int64_t batch, row_stride, token_stride, heads, kv_heads, head_dim;
};

// Products of one vector with several, which are `stride` apart.
template <int kCount, typename T>
VLCORE_INLINE void dots(const float* a, const T* b, int64_t stride, int64_t size, float* products) {
  Vec sums[kCount] = {};
  for_vecs(size, [&](int64_t d, auto lanes) VLCORE_INLINED {
    const Vec of_a = load(a + d, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sums[i] += of_a * load(b + i * stride + d, lanes);
  });
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) products[i] = reduce_add(sums[i]);
}

// Adds several vectors, each times its factor, one after another.
template <int kCount, typename T>
VLCORE_INLINE void add_scaled(const float* factors, const T* from, int64_t stride, float* to, int64_t size) {
  for_vecs(size, [&](int64_t d, auto lanes) VLCORE_INLINED {
    Vec sum = load(to + d, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sum += load(from + i * stride + d, lanes) * factors[i];
    store(to + d, sum, lanes);
  });
}

template <typename T>
class DecodeHeads {
 public:
  // lengths (batch): the tokens in the cache of each row, and the position of its new one.
  DecodeHeads(const DecodeShape& shape, const int64_t* lengths, double theta, float scale)
      : shape_(shape), lengths_(lengths), scale_(scale), half_(shape.head_dim / 2), first_part_(shape.batch + 1) {
    for (int64_t row = 0; row < shape.batch; ++row) {
      const int64_t keys = lengths[row] + 1, pairs = (keys + 2 * kKeysOfPart - 1) / (2 * kKeysOfPart);
      first_part_[row + 1] = first_part_[row] + (keys <= kKeysOfPart ? 1 : 2 * pairs);
    }
    turns_.resize(shape.batch * 2 * half_);
    statistics_.resize(2 * num_parts() * shape.heads);
    sums_.resize(num_parts() * shape.heads * shape.head_dim);
    scratch_.resize(num_parts() * shape.heads * (shape.head_dim + kKeysOfPart));
    const std::vector<float> frequencies = rotary_frequencies(theta, shape.head_dim);
    for (int64_t row = 0; row < shape.batch; ++row) {
      float* cosines = turns_.data() + row * 2 * half_;
      rotary_angles(lengths[row], frequencies, cosines, cosines + half_);
    }
  }

  int64_t num_parts() const { return first_part_.back(); }
  int64_t num_heads() const { return shape_.batch * shape_.heads; }

  // One part of a row's keys, for all of its heads: its tokens are read one after another, as they lie in the cache.
  // The part that ends with the new token writes it to the cache first.
  void attend(int64_t part, const T* q, const T* k, const T* v, T* key_cache, T* value_cache) {
    const int64_t row = std::upper_bound(first_part_.begin(), first_part_.end(), part) - first_part_.begin() - 1;
    const int64_t index = part - first_part_[row], parts = first_part_[row + 1] - first_part_[row];
    const int64_t keys = lengths_[row] + 1, begin = keys * index / parts, end = keys * (index + 1) / parts;
    const int64_t dim = shape_.head_dim, heads = shape_.heads, row_at = row * shape_.row_stride;
    if (index + 1 == parts) append(row, k, v, key_cache + row_at, value_cache + row_at);
    float* rotated = scratch_.data() + part * heads * (dim + kKeysOfPart);
    float* scores = rotated + heads * dim;
    for (int64_t head = 0; head < heads; ++head) {
      // Scores are kept times log2(e), for exp2.
      turn(q + (row * heads + head) * dim, row, scale_ * kLog2E, rotated + head * dim);
    }
    each_head(key_cache + row_at, begin, end, [&](auto count, int64_t head, int64_t key, const T* from) VLCORE_INLINED {
      float* to = scores + head * kKeysOfPart + key;
      dots<count>(rotated + head * dim, from, shape_.token_stride, dim, to);
    });
    for (int64_t head = 0; head < heads; ++head) {
      weigh(scores + head * kKeysOfPart, end - begin, statistics_.data() + 2 * (part * heads + head));
    }
    float* sums = sums_.data() + part * heads * dim;
    each_head(value_cache + row_at, begin, end,
              [&](auto count, int64_t head, int64_t key, const T* from) VLCORE_INLINED {
                const float* weights = scores + head * kKeysOfPart + key;
                add_scaled<count>(weights, from, shape_.token_stride, sums + head * dim, dim);
              });
  }

  // The parts of one head of all rows, together: out (batch, heads, head_dim).
  void join(int64_t index, T* out) {
    const int64_t row = index / shape_.heads, head = index % shape_.heads, dim = shape_.head_dim;
    const auto at = [&](int64_t part) { return part * shape_.heads + head; };
    float largest = -INFINITY, weights = 0.f;
    for (int64_t part = first_part_[row]; part < first_part_[row + 1]; ++part) {
      largest = std::max(largest, statistics_[2 * at(part)]);
    }
    float* all = scratch_.data() + first_part_[row] * shape_.heads * (dim + kKeysOfPart) + head * dim;
    std::fill(all, all + dim, 0.f);
    for (int64_t part = first_part_[row]; part < first_part_[row + 1]; ++part) {
      const float weight = std::exp2(statistics_[2 * at(part)] - largest);
      weights += weight * statistics_[2 * at(part) + 1];
      add_scaled<1>(&weight, sums_.data() + at(part) * dim, 0, all, dim);
    }
    for_vecs(dim, [&](int64_t d, auto lanes)
                      VLCORE_INLINED { store(out + index * dim + d, load(all + d, lanes) / weights, lanes); });
  }

 private:
  // step(count, head, first, from) for each head of the tokens [begin, end) of a row's cache, in groups of as many as
  // the constant `count`: the first is `first` behind the beginning, and its part of the cache is `from`.
  template <typename Step>
  VLCORE_INLINED void each_head(const T* cache, int64_t begin, int64_t end, const Step& step) const {
    const int64_t group = shape_.heads / shape_.kv_heads;
    int64_t token = begin;
    const auto several = [&](auto count) VLCORE_INLINED {
      const T* from = cache + token * shape_.token_stride;
      for (int64_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head, from += shape_.head_dim) {
        for (int i = 0; i < count; ++i) ask_for(from + (count + i) * shape_.token_stride);
        for (int64_t of_group = 0; of_group < group; ++of_group) {
          step(count, kv_head * group + of_group, token - begin, from);
        }
      }
      token += count;
    };
    while (token + kTogether <= end) several(std::integral_constant<int, kTogether>{});
    while (token < end) several(std::integral_constant<int, 1>{});
  }

  // So much is done with a token that loads do not run far enough ahead by themselves.
  VLCORE_INLINED void ask_for(const T* head) const {
    for (int64_t d = 0; d < shape_.head_dim; d += 64 / sizeof(T)) __builtin_prefetch(head + d, 0, 2);
  }

  // Turns a head to its row's position.
  void turn(const T* head, int64_t row, float factor, float* to) const {
    const float* cosines = turns_.data() + row * 2 * half_;
    rotate(head, cosines, cosines + half_, half_, 1.f, factor, to);
  }

  void append(int64_t row, const T* k, const T* v, T* key_cache, T* value_cache) {
    const int64_t dim = shape_.head_dim, size = shape_.kv_heads * dim, to = lengths_[row] * shape_.token_stride;
    float* key = scratch_.data() + (first_part_[row + 1] - 1) * shape_.heads * (dim + kKeysOfPart);
    for (int64_t head = 0; head < shape_.kv_heads; ++head) {
      turn(k + row * size + head * dim, row, 1.f, key);
      for_vecs(dim, [&](int64_t d, auto lanes)
                        VLCORE_INLINED { store(key_cache + to + head * dim + d, load(key + d, lanes), lanes); });
    }
    std::memcpy(static_cast<void*>(value_cache + to), v + row * size, size * sizeof(T));
  }

  // Scores -> weights 2^(score - their maximum); statistics: the maximum, and the sum of the weights.
  static void weigh(float* scores, int64_t count, float* statistics) {
    float largest = -INFINITY, sum = 0.f;
    for (int64_t key = 0; key < count; ++key) largest = std::max(largest, scores[key]);
    for_vecs(count, [&](int64_t key, auto lanes)
                        VLCORE_INLINED { store(scores + key, exp2(load(scores + key, lanes) - largest), lanes); });
    for (int64_t key = 0; key < count; ++key) sum += scores[key];
    statistics[0] = largest, statistics[1] = sum;
  }

  const DecodeShape shape_;
  const int64_t* lengths_;
  const float scale_;
  const int64_t half_;
  std::vector<int64_t> first_part_;
  std::vector<float> turns_, statistics_, sums_, scratch_;
};

}  // namespace vlcore::VLCORE_LEVEL
