#pragma once
#include <cstdint>

// Kernels of CUDA on raw pointers of the current device, all aligned to 16 bytes; matrices are row-major and contiguous
// unless strides are given. They are queued, not waited for, and throw std::invalid_argument where they cannot run what
// they are given, std::runtime_error where CUDA does not take it.
namespace vlcore::cuda {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// The dtype of a kernel's tensors, and the cudaStream_t that it is queued on.
struct Queue {
  DType dtype;
  void* stream;
};

// y (rows, outputs) = x (rows, inputs) weight^T + bias (outputs) or null, up to 16 rows. The weight: 8 bits (outputs,
// inputs) int8, or 4 bits (outputs, inputs / 2), two a byte and each plus 8, the even column in the low half; a row is
// a multiple of 16 bytes. scales (outputs, groups), a group being 32, 64 or 128 inputs, or all.
void quantized_linear_forward(const void* x, const void* values, const float* scales, const void* bias, void* y,
                              int64_t rows, int64_t outputs, int64_t inputs, int64_t groups, int bits, Queue queue);

// Rotates q (batch, heads, head_dim) and k by their positions lengths (batch), integers of length_bytes, writes k and v
// (batch, kv_heads, head_dim) to the caches there, and attends over lengths + 1 keys. A cache has row_stride elements
// from row to row of the batch, token_stride from token to token, and (kv_heads, head_dim) contiguous; head_dim is 64
// or 128. From compute capability 9.0 on.
void decode_attention_forward(const void* q, const void* k, const void* v, void* key_cache, void* value_cache,
                              const void* lengths, void* out, int64_t batch, int64_t row_stride, int64_t token_stride,
                              int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t length_bytes, double theta,
                              float scale, Queue queue);

}  // namespace vlcore::cuda
