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
#include "cpu/decode_heads.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void decode_attention_forward(const void* q, const void* k, const void* v, void* key_cache, void* value_cache,
                                     const int64_t* lengths, void* out, int64_t batch, int64_t row_stride,
                                     int64_t token_stride, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                     double theta, float scale) {
  DecodeHeads<T> attention({batch, row_stride, token_stride, heads, kv_heads, head_dim}, lengths, theta, scale);
#pragma omp parallel if (attention.num_parts() > 1)
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < attention.num_parts(); ++part) {
      attention.attend(part, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                       static_cast<T*>(key_cache), static_cast<T*>(value_cache));
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < attention.num_heads(); ++head) attention.join(head, static_cast<T*>(out));
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
