// Attention of one token a row over the caches, in pieces that threads share. Read once per level.
namespace vlcore::VLCORE_LEVEL {

// A row's keys are split into parts that depend on its length alone, so that sums depend neither on the number of
// threads nor on the other rows. Their number is even, for two threads to share alike.
constexpr int64_t kKeysOfPart = 64;

struct DecodeShape {
  int64_t batch, row_stride, token_stride, heads, kv_heads, head_dim;
};

template <typename T>
VLCORE_INLINE float dot(const float* a, const T* b, int64_t size) {
  Vec sum = {};
  for_vecs(size, [&](int64_t d, auto lanes) VLCORE_INLINED { sum += load(a + d, lanes) * load(b + d, lanes); });
  return reduce_add(sum);
}

template <typename T>
VLCORE_INLINE void add_scaled(float factor, const T* from, float* to, int64_t size) {
  for_vecs(size, [&](int64_t d, auto lanes)
                     VLCORE_INLINED { store(to + d, load(to + d, lanes) + load(from + d, lanes) * factor, lanes); });
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
    const double ratio = half_ ? std::pow(theta, -1. / half_) : 1.;
    for (int64_t row = 0; row < shape.batch; ++row) {
      double angle = lengths[row];
      for (int64_t i = 0; i < half_; ++i, angle *= ratio) {
        turns_[row * 2 * half_ + i] = static_cast<float>(std::cos(angle));
        turns_[(row * 2 + 1) * half_ + i] = static_cast<float>(std::sin(angle));
      }
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
      rotate(q + (row * heads + head) * dim, row, scale_ * kLog2E, rotated + head * dim);
    }
    for (int64_t key = begin; key < end; ++key) {
      const T* token = key_cache + row_at + key * shape_.token_stride;
      for (int64_t head = 0; head < heads; ++head) {
        scores[head * kKeysOfPart + key - begin] = dot(rotated + head * dim, token + kv_head(head) * dim, dim);
      }
    }
    for (int64_t head = 0; head < heads; ++head) {
      weigh(scores + head * kKeysOfPart, end - begin, statistics_.data() + 2 * (part * heads + head));
    }
    float* sums = sums_.data() + part * heads * dim;
    for (int64_t key = begin; key < end; ++key) {
      const T* token = value_cache + row_at + key * shape_.token_stride;
      for (int64_t head = 0; head < heads; ++head) {
        add_scaled(scores[head * kKeysOfPart + key - begin], token + kv_head(head) * dim, sums + head * dim, dim);
      }
    }
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
      add_scaled(weight, sums_.data() + at(part) * dim, all, dim);
    }
    for_vecs(dim, [&](int64_t d, auto lanes)
                      VLCORE_INLINED { store(out + index * dim + d, load(all + d, lanes) / weights, lanes); });
  }

 private:
  int64_t kv_head(int64_t head) const { return head * shape_.kv_heads / shape_.heads; }

  // Rotates a head to its row's position: the pairs are its two halves.
  void rotate(const T* head, int64_t row, float factor, float* to) const {
    const float *cosines = turns_.data() + row * 2 * half_, *sines = cosines + half_;
    for_vecs(half_, [&](int64_t i, auto lanes) VLCORE_INLINED {
      const Vec first = load(head + i, lanes), second = load(head + half_ + i, lanes);
      const Vec cosine = load(cosines + i, lanes), sine = load(sines + i, lanes);
      store(to + i, (first * cosine - second * sine) * factor, lanes);
      store(to + half_ + i, (second * cosine + first * sine) * factor, lanes);
    });
  }

  void append(int64_t row, const T* k, const T* v, T* key_cache, T* value_cache) {
    const int64_t dim = shape_.head_dim, size = shape_.kv_heads * dim, to = lengths_[row] * shape_.token_stride;
    float* key = scratch_.data() + (first_part_[row + 1] - 1) * shape_.heads * (dim + kKeysOfPart);
    for (int64_t head = 0; head < shape_.kv_heads; ++head) {
      rotate(k + row * size + head * dim, row, 1.f, key);
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
