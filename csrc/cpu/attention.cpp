#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/attention.cpp"
#define VLCORE_MULTIPLIES_TILES
#include "cpu/for_each_level.h"

namespace vlcore {

void attention_forward(Heads q, Heads k, Heads v, const int64_t* positions, const int32_t* bounds, void* out,
                       float* lse, int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, int64_t sequences, double theta, bool causal, float scale, Target target) {
  VLCORE_RUN(target, attention_forward, q, k, v, positions, bounds, out, lse, batch, queries, keys, heads, kv_heads,
             head_dim, sequences, theta, causal, scale);
}

void attention_backward(const void* grad_out, Heads q, Heads k, Heads v, const int64_t* positions,
                        const int32_t* bounds, const void* out, const float* lse, void* grad_q, void* grad_k,
                        void* grad_v, int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                        int64_t head_dim, int64_t sequences, double theta, bool causal, float scale, Target target) {
  VLCORE_RUN(target, attention_backward, grad_out, q, k, v, positions, bounds, out, lse, grad_q, grad_k, grad_v, batch,
             queries, keys, heads, kv_heads, head_dim, sequences, theta, causal, scale);
}

}  // namespace vlcore

#else
#include "cpu/sequence_attention.h"
#include "cpu/sequence_attention_backward.h"
#include "cpu/sequence_attention_forward.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void attention_forward(Heads q, Heads k, Heads v, const int64_t* positions, const int32_t* bounds, void* out,
                              float* lse, int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                              int64_t head_dim, int64_t sequences, double theta, bool causal, float scale) {
  attend_forward(
      {q, k, v, positions, bounds, batch, queries, keys, heads, kv_heads, head_dim, sequences, theta, causal, scale},
      static_cast<T*>(out), lse);
}

template <typename T>
static void attention_backward(const void* grad_out, Heads q, Heads k, Heads v, const int64_t* positions,
                               const int32_t* bounds, const void* out, const float* lse, void* grad_q, void* grad_k,
                               void* grad_v, int64_t batch, int64_t queries, int64_t keys, int64_t heads,
                               int64_t kv_heads, int64_t head_dim, int64_t sequences, double theta, bool causal,
                               float scale) {
  const Gradients<T> gradients{static_cast<const T*>(grad_out), static_cast<const T*>(out), lse,
                               static_cast<T*>(grad_q),         static_cast<T*>(grad_k),    static_cast<T*>(grad_v)};
  attend_backward(
      {q, k, v, positions, bounds, batch, queries, keys, heads, kv_heads, head_dim, sequences, theta, causal, scale},
      gradients);
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
