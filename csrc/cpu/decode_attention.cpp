#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/decode_attention.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void decode_attention_forward(const void* q, const void* k, const void* v, void* key_cache, void* value_cache,
                              const int64_t* lengths, void* out, int64_t batch, int64_t row_stride,
                              int64_t token_stride, int64_t heads, int64_t kv_heads, int64_t head_dim, double theta,
                              float scale, Target target) {
  VLCORE_RUN(target, decode_attention_forward, q, k, v, key_cache, value_cache, lengths, out, batch, row_stride,
             token_stride, heads, kv_heads, head_dim, theta, scale);
}

}  // namespace vlcore

#else
namespace vlcore::VLCORE_LEVEL {

// Keys whose scores are held at a time.
constexpr int64_t kChunk = 64;
// Few heads are split over the keys, into parts that depend on the shapes alone, so that the sums do not depend on the
// number of threads.
constexpr int64_t kWantedParts = 16;
constexpr int64_t kKeysOfPart = 256;

// Rotates a head by its angles: the pairs are its two halves.
template <typename T>
static void rotate(const T* head, const float* cosines, const float* sines, int64_t half, float factor, float* to) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = static_cast<float>(head[i]), second = static_cast<float>(head[i + half]);
    to[i] = (first * cosines[i] - second * sines[i]) * factor;
    to[i + half] = (second * cosines[i] + first * sines[i]) * factor;
  }
}

template <typename T>
VLCORE_INLINE float dot(const float* a, const T* b, int64_t size) {
  const int64_t whole = size / kLanes * kLanes;
  Vec sum = {};
  for (int64_t d = 0; d < whole; d += kLanes) sum += load(a + d) * load(b + d);
  if (whole < size) sum += load_first(a + whole, size - whole) * load_first(b + whole, size - whole);
  return reduce_add(sum);
}

template <typename T>
VLCORE_INLINE void add_scaled(float factor, const T* from, float* to, int64_t size) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) store(to + d, load(to + d) + load(from + d) * factor);
  for (int64_t d = whole; d < size; ++d) to[d] += static_cast<float>(from[d]) * factor;
}

VLCORE_INLINE void rescale(float factor, float* values, int64_t size) {
  for (int64_t d = 0; d < size; ++d) values[d] *= factor;
}

// One query over some keys: `out` is the sum of values weighted by 2^(score - maximum), `sum` that of the weights.
struct Partial {
  float maximum, sum;
  float* out;
};

template <typename T>
static void attend_keys(const float* q, const T* keys, const T* values, int64_t count, int64_t stride, int64_t dim,
                        Partial& partial) {
  float scores[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t size = std::min(kChunk, count - first);
    float largest = partial.maximum;
    for (int64_t key = 0; key < size; ++key) {
      scores[key] = dot(q, keys + (first + key) * stride, dim);
      largest = std::max(largest, scores[key]);
    }
    const float shrink = std::exp2(partial.maximum - largest);
    rescale(shrink, partial.out, dim);
    partial.sum *= shrink;
    partial.maximum = largest;
    std::fill(scores + size, scores + kChunk, -INFINITY);
    for (int64_t key = 0; key < kChunk; key += kLanes) store(scores + key, exp2(load(scores + key) - largest));
    for (int64_t key = 0; key < size; ++key) {
      partial.sum += scores[key];
      add_scaled(scores[key], values + (first + key) * stride, partial.out, dim);
    }
  }
}

template <typename T>
static void decode_attention_forward(const void* q, const void* k, const void* v, void* key_cache, void* value_cache,
                                     const int64_t* lengths, void* out, int64_t batch, int64_t row_stride,
                                     int64_t token_stride, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                     double theta, float scale) {
  const int64_t half = head_dim / 2, group = heads / std::max<int64_t>(kv_heads, 1);
  std::vector<float> rotated(batch * heads * head_dim), cosines(half), sines(half), key(head_dim);
  int64_t longest = 0;
  for (int64_t row = 0; row < batch; ++row) {
    longest = std::max(longest, lengths[row] + 1);
    for (int64_t i = 0; i < half; ++i) {
      const double angle = lengths[row] * std::pow(theta, -2. * i / head_dim);
      cosines[i] = static_cast<float>(std::cos(angle)), sines[i] = static_cast<float>(std::sin(angle));
    }
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = (row * heads + head) * head_dim;
      // Scores are kept times log2(e), for exp2.
      rotate(static_cast<const T*>(q) + at, cosines.data(), sines.data(), half, scale * kLog2E, rotated.data() + at);
    }
    for (int64_t head = 0; head < kv_heads; ++head) {
      const int64_t from = (row * kv_heads + head) * head_dim;
      const int64_t to = row * row_stride + lengths[row] * token_stride + head * head_dim;
      rotate(static_cast<const T*>(k) + from, cosines.data(), sines.data(), half, 1.f, key.data());
      for (int64_t d = 0; d < head_dim; ++d) static_cast<T*>(key_cache)[to + d] = convert<T>(key[d]);
      std::memcpy(static_cast<T*>(value_cache) + to, static_cast<const T*>(v) + from, head_dim * sizeof(T));
    }
  }
  const int64_t pairs = batch * kv_heads;
  if (pairs == 0) return;
  const int64_t fitting = std::max<int64_t>(longest / kKeysOfPart, 1);
  const int64_t parts = std::min(fitting, (kWantedParts + pairs - 1) / pairs);
  std::vector<float> sums(batch * heads * parts * head_dim);
  std::vector<Partial> partials(batch * heads * parts);
#pragma omp parallel for schedule(dynamic) if (pairs * longest * head_dim >= 1 << 15)
  for (int64_t index = 0; index < pairs * parts; ++index) {
    const int64_t pair = index / parts, part = index % parts, row = pair / kv_heads, kv_head = pair % kv_heads;
    const int64_t keys = lengths[row] + 1, begin = keys * part / parts, end = keys * (part + 1) / parts;
    const int64_t first = row * row_stride + begin * token_stride + kv_head * head_dim;
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = row * heads + kv_head * group + member, at = head * parts + part;
      partials[at] = {-INFINITY, 0.f, sums.data() + at * head_dim};
      attend_keys(rotated.data() + head * head_dim, static_cast<const T*>(key_cache) + first,
                  static_cast<const T*>(value_cache) + first, end - begin, token_stride, head_dim, partials[at]);
    }
  }
  for (int64_t head = 0; head < batch * heads; ++head) {
    Partial& all = partials[head * parts];
    for (int64_t part = 1; part < parts; ++part) {
      const Partial& other = partials[head * parts + part];
      if (other.sum == 0.f) continue;
      const float largest = std::max(all.maximum, other.maximum);
      rescale(std::exp2(all.maximum - largest), all.out, head_dim);
      all.sum = all.sum * std::exp2(all.maximum - largest) + other.sum * std::exp2(other.maximum - largest);
      add_scaled(std::exp2(other.maximum - largest), other.out, all.out, head_dim);
      all.maximum = largest;
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      static_cast<T*>(out)[head * head_dim + d] = convert<T>(all.out[d] / all.sum);
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
