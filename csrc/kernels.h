#pragma once
#include <cstdint>

// Kernels on raw pointers: no torch, no Python. All matrices are row-major and contiguous unless strides are given.
namespace vlcore {

// The dtype of a kernel's tensors. Statistics, and whatever is said to be float, are float32 in both.
enum class DType : int { float32 = 0, bfloat16 = 1 };

// What a machine's vector instructions can do; each level includes those below.
enum class Level : int { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

struct Target {
  DType dtype;
  Level level;
};

// The highest level of this machine.
Level best_level();

// x, y (rows, cols); weight (cols); rstd (rows).
void rms_norm_forward(const void* x, const void* weight, void* y, float* rstd, int64_t rows, int64_t cols, float eps,
                      Target target);

// grad_weight (cols) is summed in an order that depends on the shape alone, not on the number of threads.
void rms_norm_backward(const void* grad_y, const void* x, const void* weight, const float* rstd, void* grad_x,
                       void* grad_weight, int64_t rows, int64_t cols, Target target);

// SAM's attention with decomposed relative positions: q, k, v, out (heads, height * width, head_dim), tables
// (2 * height - 1, head_dim) and (2 * width - 1, head_dim); lse (heads, height * width) is the logarithm of each
// softmax's denominator.
void rel_pos_attention_forward(const void* q, const void* k, const void* v, const void* rel_pos_h,
                               const void* rel_pos_w, void* out, float* lse, int64_t heads, int64_t height,
                               int64_t width, int64_t head_dim, Target target);

// The same within windows: qkv (batch, height, width, 3, heads, head_dim), qkv_bias (3, heads, head_dim) or null, out
// (batch, height, width, heads, head_dim), lse (batch, heads, height, width).
void window_attention_forward(const void* qkv, const void* qkv_bias, const void* rel_pos_h, const void* rel_pos_w,
                              void* out, float* lse, int64_t batch, int64_t height, int64_t width, int64_t heads,
                              int64_t head_dim, int64_t window, Target target);

}  // namespace vlcore
