#pragma once
#include <array>
#include <cstdint>

// GCC compiles each kernel for several levels of x86's instructions, other compilers for the first; tiles are Linux's.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VLCORE_X86_LEVELS
#if defined(__linux__) && __GNUC__ >= 11
#define VLCORE_X86_TILES
#endif
#endif

// Kernels on raw pointers: no torch, no Python. All matrices are row-major and contiguous unless strides are given.
namespace vlcore {

// The dtype of a kernel's tensors. Statistics, and whatever is said to be float, are float32 in both.
enum class DType : int { float32 = 0, bfloat16 = 1 };

// What a machine's vector instructions can do; each level includes those below.
enum class Level : int { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

struct Target {
  DType dtype;
  Level level;
};

// Elements from batch to batch, head to head and token to token.
using TokenStrides = std::array<int64_t, 3>;

// The highest level of this machine. Linux is asked for the use of tiles, on behalf of the process.
Level best_level();

// Whether several stretches of memory are read at once faster than one: by a quarter on Intel's Xeon (Sapphire Rapids),
// where AMD's Zen 4 reads one fastest.
bool memory_serves_streams();

// Asks the system to put what is not yet written of `size` bytes on huge pages: a matrix that is read once a token from
// memory is read a quarter faster from them. Where there are none it does nothing.
void prefer_huge_pages(void* memory, int64_t size);

// x, y (rows, cols); weight (cols).
void rms_norm_forward(const void* x, const void* weight, void* y, int64_t rows, int64_t cols, float eps, Target target);

// grad_weight (cols) is summed in an order that depends on the shape alone, not on the number of threads.
void rms_norm_backward(const void* grad_y, const void* x, const void* weight, void* grad_x, void* grad_weight,
                       int64_t rows, int64_t cols, float eps, Target target);

// total = x + residual, and y its norm; shapes as above.
void add_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* total, int64_t rows,
                          int64_t cols, float eps, Target target);
void add_rms_norm_backward(const void* grad_y, const void* grad_total, const void* total, const void* weight,
                           void* grad_sum, void* grad_weight, int64_t rows, int64_t cols, float eps, Target target);

// x, y (rows, cols); weight, bias (cols); statistics (rows, 2), the mean and 1 / the standard deviation, which a
// forward writes unless they are null; grad_weight_and_bias (2, cols).
void layer_norm_forward(const void* x, const void* weight, const void* bias, void* y, float* statistics, int64_t rows,
                        int64_t cols, float eps, Target target);
void layer_norm_backward(const void* grad_y, const void* x, const void* weight, const float* statistics, void* grad_x,
                         void* grad_weight_and_bias, int64_t rows, int64_t cols, Target target);

// y = silu(gate) * up, all (size).
void swiglu_forward(const void* gate, const void* up, void* y, int64_t size, Target target);
void swiglu_backward(const void* grad_y, const void* gate, const void* up, void* grad_gate, void* grad_up, int64_t size,
                     Target target);

// SAM's attention with decomposed relative positions: q, k, v, out (batch, heads, height * width, head_dim), each with
// strides of its own and rows that are contiguous; tables (2 * height - 1, head_dim) and (2 * width - 1, head_dim).
// statistics (batch, heads, height * width, 2) are for the backward: the maximum that a softmax is taken relative to,
// in the unit of its kernel, and its sum.
void rel_pos_attention_forward(const void* q, const void* k, const void* v, const void* rel_pos_h,
                               const void* rel_pos_w, void* out, float* statistics, TokenStrides q_strides,
                               TokenStrides k_strides, TokenStrides v_strides, TokenStrides out_strides, int64_t batch,
                               int64_t heads, int64_t height, int64_t width, int64_t head_dim, Target target);

// Gradients are contiguous, and sums do not depend on the number of threads.
void rel_pos_attention_backward(const void* grad_out, const void* q, const void* k, const void* v,
                                const void* rel_pos_h, const void* rel_pos_w, const void* out, const float* statistics,
                                void* grad_q, void* grad_k, void* grad_v, void* grad_rel_pos_h, void* grad_rel_pos_w,
                                TokenStrides grad_out_strides, TokenStrides q_strides, TokenStrides k_strides,
                                TokenStrides v_strides, TokenStrides out_strides, int64_t batch, int64_t heads,
                                int64_t height, int64_t width, int64_t head_dim, Target target);

// The same within windows: qkv (batch, height, width, 3, heads, head_dim), qkv_bias (3, heads, head_dim) or null, out
// (batch, height, width, heads, head_dim), statistics (batch, heads, height, width, 2). The gradient of a null bias is
// that of the zeros in its place.
void window_attention_forward(const void* qkv, const void* qkv_bias, const void* rel_pos_h, const void* rel_pos_w,
                              void* out, float* statistics, int64_t batch, int64_t height, int64_t width, int64_t heads,
                              int64_t head_dim, int64_t window, Target target);
void window_attention_backward(const void* grad_out, const void* qkv, const void* qkv_bias, const void* rel_pos_h,
                               const void* rel_pos_w, const void* out, const float* statistics, void* grad_qkv,
                               void* grad_qkv_bias, void* grad_rel_pos_h, void* grad_rel_pos_w, int64_t batch,
                               int64_t height, int64_t width, int64_t heads, int64_t head_dim, int64_t window,
                               Target target);

// A tensor (batch, tokens, heads, head_dim): its strides in elements; those of a head are contiguous.
struct Heads {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Turns each pair (x[i], x[i + head_dim / 2]) of a head by position * theta^(-2i / head_dim), or back if `backwards`:
// y (batch, tokens, heads, head_dim), positions (batch, tokens).
void apply_rope(Heads x, const int64_t* positions, void* y, int64_t batch, int64_t tokens, int64_t heads,
                int64_t head_dim, double theta, bool backwards, Target target);

// Softmax attention of q (batch, queries, heads, head_dim) to k and v (batch, keys, kv_heads, head_dim); positions
// (batch, keys) rotate q and k as apply_rope does, the queries by the last of them, or null. bounds (sequences + 1)
// packs sequences into one row of the batch, or null. out as q and contiguous, lse (batch, heads, queries) is the
// logarithm of each softmax's denominator. Causal: the last query sees the last key of its sequence.
void attention_forward(Heads q, Heads k, Heads v, const int64_t* positions, const int32_t* bounds, void* out,
                       float* lse, int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, int64_t sequences, double theta, bool causal, float scale, Target target);

// The gradients are contiguous, and the same for any number of threads.
void attention_backward(const void* grad_out, Heads q, Heads k, Heads v, const int64_t* positions,
                        const int32_t* bounds, const void* out, const float* lse, void* grad_q, void* grad_k,
                        void* grad_v, int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                        int64_t head_dim, int64_t sequences, double theta, bool causal, float scale, Target target);

// y (rows, outputs) = x (rows, inputs) weight (outputs, inputs)^T + bias (outputs) or null; for few rows.
void linear_forward(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t outputs,
                    int64_t inputs, Target target);

// The same for many rows, y = activation(x weight^T + bias) + residual, where the activation is GELU with the exact
// erf, or none; residual (rows, outputs) or null. The rows of y are y_stride elements apart.
void linear_blocked_forward(const void* x, const void* weight, const void* bias, const void* residual, void* y,
                            int64_t rows, int64_t outputs, int64_t inputs, int64_t y_stride, bool gelu, Target target);

// grad_x (rows, inputs) = grad_y (rows, outputs) weight, and grad_weight (outputs, inputs) = grad_y^T x.
void linear_grad_x(const void* grad_y, const void* weight, void* grad_x, int64_t rows, int64_t outputs, int64_t inputs,
                   Target target);
void linear_grad_weight(const void* grad_y, const void* x, void* grad_weight, int64_t rows, int64_t outputs,
                        int64_t inputs, Target target);

// As linear, with a weight of integers: 8 bits (outputs, inputs) int8, or 4 bits (outputs, ceil(inputs / 2)), two a
// byte and each plus 8, the even column in the low half; scales (outputs, groups), a group being 32, 64 or 128 inputs,
// or all.
void quantized_linear_forward(const void* x, const void* values, const float* scales, const void* bias, void* y,
                              int64_t rows, int64_t outputs, int64_t inputs, int64_t groups, int bits, Target target);

// weight (outputs, inputs) = what such integers stand for.
void dequantize(const void* values, const float* scales, void* weight, int64_t outputs, int64_t inputs, int64_t groups,
                int bits, Target target);

// Rotates q (batch, heads, head_dim) and k by their positions lengths (batch), writes k and v (batch, kv_heads,
// head_dim) to the caches there, and attends over lengths + 1 keys. A cache has row_stride elements from row to row of
// the batch, token_stride from token to token, and (kv_heads, head_dim) contiguous.
void decode_attention_forward(const void* q, const void* k, const void* v, void* key_cache, void* value_cache,
                              const int64_t* lengths, void* out, int64_t batch, int64_t row_stride,
                              int64_t token_stride, int64_t heads, int64_t kv_heads, int64_t head_dim, double theta,
                              float scale, Target target);

// For the loss of a language model's head: a block of its vocabulary, the `words` from `first` on, whose logits are
// (words, rows). Brings up to date what is known of each row's softmax: its largest logit, the sum of exp(logit -
// largest) and, in the block of its label, the label's logit; `factor` (rows) is what exps taken before are to be
// multiplied by. numerators (words, rows), exp(logit - largest), may be null, or the logits themselves.
void softmax_block(const void* logits, const int64_t* labels, void* numerators, float* largest, float* sum,
                   float* label_logit, float* factor, int64_t first, int64_t words, int64_t rows, Target target);

// sums = sums * factor (rows) + block, both (rows, cols).
void add_scaled_rows(const void* block, const float* factor, float* sums, int64_t rows, int64_t cols, Target target);

// With sums (rows, cols) those of numerator * weight over the vocabulary: grad_hidden (rows, cols) = (sums / sum -
// weight[label]) * row_scale.
void cross_entropy_grad_hidden(const float* sums, const float* sum, const float* row_scale, const int64_t* labels,
                               const void* weight, void* grad_hidden, int64_t rows, int64_t cols, Target target);

// Of the same block of logits, with largest and sum those of the whole vocabulary: grad_logits (words, rows), of
// grad_stride elements from word to word, = (exp(logit - largest) / sum - 1 at the label) * row_scale.
void cross_entropy_grad_logits(const void* logits, const int64_t* labels, const float* largest, const float* sum,
                               const float* row_scale, void* grad_logits, int64_t grad_stride, int64_t first,
                               int64_t words, int64_t rows, Target target);

// A weight (outputs, inputs) as linear takes it, where bits is 0, or as quantized_linear does.
struct Weight {
  const void* values;
  const float* scales;
  int64_t groups;
  int bits;
};

// A whole LLaMA block for one token a row: x (batch, hidden) joins the stream residual, or begins it where that is
// null; y is what the block gives, and total (batch, hidden) the stream that it is to join. Caches as above; q, k and v
// are of one form, and so are gate and up.
void decode_block_forward(const void* x, const void* residual, const void* attention_norm, const void* mlp_norm,
                          Weight q, Weight k, Weight v, Weight o, Weight gate, Weight up, Weight down, void* key_cache,
                          void* value_cache, const int64_t* lengths, void* y, void* total, int64_t batch,
                          int64_t hidden, int64_t intermediate, int64_t row_stride, int64_t token_stride, int64_t heads,
                          int64_t kv_heads, int64_t head_dim, double theta, float eps, Target target);

// SAM's features: resized (batch, size, size, channels) is detail + alpha * skip, both (batch, height, width,
// channels), bilinear with align_corners=False and rounded once. skip, and all that is of it, may be null.
void merge_and_resize_forward(const void* detail, const void* skip, const float* alpha, void* resized, int64_t batch,
                              int64_t height, int64_t width, int64_t channels, int64_t size, Target target);
void merge_and_resize_backward(const void* grad_resized, const void* skip, const float* alpha, void* grad_detail,
                               void* grad_skip, float* grad_alpha, int64_t batch, int64_t height, int64_t width,
                               int64_t channels, int64_t size, Target target);

}  // namespace vlcore
