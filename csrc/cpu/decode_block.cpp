#if defined(_OPENMP)
#include <omp.h>
#endif
#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/decode_block.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void decode_block_forward(const void* x, const void* residual, const void* attention_norm, const void* mlp_norm,
                          Weight q, Weight k, Weight v, Weight o, Weight gate, Weight up, Weight down, void* key_cache,
                          void* value_cache, const int64_t* lengths, void* y, void* total, int64_t batch,
                          int64_t hidden, int64_t intermediate, int64_t row_stride, int64_t token_stride, int64_t heads,
                          int64_t kv_heads, int64_t head_dim, double theta, float eps, Target target) {
  VLCORE_RUN(target, decode_block_forward, x, residual, attention_norm, mlp_norm, q, k, v, o, gate, up, down, key_cache,
             value_cache, lengths, y, total, batch, hidden, intermediate, row_stride, token_stride, heads, kv_heads,
             head_dim, theta, eps);
}

}  // namespace vlcore

#else
#include "cpu/decode_heads.h"
#include "cpu/few_rows.h"
#include "cpu/norm_rows.h"
#include "cpu/quantized_bytes.h"
#include "cpu/quantized_rows.h"
#include "cpu/swiglu_row.h"

namespace vlcore::VLCORE_LEVEL {

// Rows that several weights of one form multiply: what has to be done to them for it is done once.
template <typename T>
class ReadyRows {
 public:
  ReadyRows(int64_t rows, int64_t inputs, const Weight& form) : rows_(rows), inputs_(inputs) {
    if (form.bits) integers_ = std::make_unique<QuantizedRows<T> >(rows, inputs, form.groups, form.bits);
  }

  // Takes x (rows, inputs), which must stay.
  void read(const T* x) {
    x_ = x;
    if (integers_) integers_->read(x);
  }

  // y (rows, outputs) in its columns [begin, end).
  void multiply(const Weight& weight, T* y, int64_t outputs, int64_t begin, int64_t end) const {
    if (integers_) {
      integers_->multiply(static_cast<const uint8_t*>(weight.values), weight.scales, nullptr, y, outputs, begin, end);
    } else {
      multiply_rows<T>(x_, static_cast<const T*>(weight.values), nullptr, y, rows_, outputs, inputs_, begin, end);
    }
  }

 private:
  const int64_t rows_, inputs_;
  const T* x_ = nullptr;
  std::unique_ptr<QuantizedRows<T> > integers_;
};

// What a thread has for itself. Norms are so small that each thread computes all of them, which spares a barrier.
template <typename T>
struct Thread {
  std::vector<T> total, normed;
  ReadyRows<T> for_qkv, for_o, for_gate_up, for_down;
};

// total = x + residual, or x where that is null; normed = its norm.
template <typename T>
static void add_and_norm(const T* x, const T* residual, const T* weight, int64_t rows, int64_t cols, float eps,
                         Thread<T>& own) {
  for (int64_t at = 0; at < rows * cols; at += cols) {
    if (residual) {
      add_row(x + at, residual + at, own.total.data() + at, cols);
    } else {
      std::memcpy(static_cast<void*>(own.total.data() + at), x + at, cols * sizeof(T));
    }
    rms_norm_row<T>(own.total.data() + at, weight, own.normed.data() + at, cols, eps);
  }
}

// All threads of a team share the outputs; none waits for the others.
template <typename T>
static void share(const ReadyRows<T>& from, const Weight& weight, T* y, int64_t outputs) {
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < outputs; first += kOutputBlock) {
    from.multiply(weight, y, outputs, first, std::min(first + kOutputBlock, outputs));
  }
}

template <typename T>
static void decode_block_forward(const void* x, const void* residual, const void* attention_norm, const void* mlp_norm,
                                 Weight q, Weight k, Weight v, Weight o, Weight gate, Weight up, Weight down,
                                 void* key_cache, void* value_cache, const int64_t* lengths, void* y, void* total,
                                 int64_t batch, int64_t hidden, int64_t intermediate, int64_t row_stride,
                                 int64_t token_stride, int64_t heads, int64_t kv_heads, int64_t head_dim, double theta,
                                 float eps) {
  if (batch == 0) return;
  const int64_t query_size = heads * head_dim, kv_size = kv_heads * head_dim;
  const float scale = 1.f / std::sqrt(static_cast<float>(head_dim));
  DecodeHeads<T> attention({batch, row_stride, token_stride, heads, kv_heads, head_dim}, lengths, theta, scale);
  std::vector<T> queries(batch * query_size), keys(batch * kv_size), values(batch * kv_size);
  std::vector<T> attended(batch * query_size), projected(batch * hidden);
  std::vector<T> gates(batch * intermediate), ups(batch * intermediate), gated(batch * intermediate);
  int num_threads = 1;
#if defined(_OPENMP)
  num_threads = omp_get_max_threads();
#endif
  // Everything is allocated here: an exception could not leave the team.
  std::vector<Thread<T> > threads;
  for (int index = 0; index < num_threads; ++index) {
    threads.push_back({std::vector<T>(batch * hidden),
                       std::vector<T>(batch * hidden),
                       {batch, hidden, q},
                       {batch, query_size, o},
                       {batch, hidden, gate},
                       {batch, intermediate, down}});
  }
#pragma omp parallel num_threads(num_threads)
  {
    int index = 0;
#if defined(_OPENMP)
    index = omp_get_thread_num();
#endif
    Thread<T>& own = threads[index];
    add_and_norm(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(attention_norm),
                 batch, hidden, eps, own);
    own.for_qkv.read(own.normed.data());
    share(own.for_qkv, q, queries.data(), query_size);
    share(own.for_qkv, k, keys.data(), kv_size);
    share(own.for_qkv, v, values.data(), kv_size);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t part = 0; part < attention.num_parts(); ++part) {
      attention.attend(part, queries.data(), keys.data(), values.data(), static_cast<T*>(key_cache),
                       static_cast<T*>(value_cache));
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < attention.num_heads(); ++head) attention.join(head, attended.data());
    own.for_o.read(attended.data());
    share(own.for_o, o, projected.data(), hidden);
#pragma omp barrier
    add_and_norm(projected.data(), own.total.data(), static_cast<const T*>(mlp_norm), batch, hidden, eps, own);
    own.for_gate_up.read(own.normed.data());
#pragma omp for schedule(static)
    for (int64_t first = 0; first < intermediate; first += kOutputBlock) {
      const int64_t last = std::min(first + kOutputBlock, intermediate);
      own.for_gate_up.multiply(gate, gates.data(), intermediate, first, last);
      own.for_gate_up.multiply(up, ups.data(), intermediate, first, last);
      for (int64_t at = first; at < batch * intermediate; at += intermediate) {
        swiglu_row(gates.data() + at, ups.data() + at, gated.data() + at, last - first);
      }
    }
    own.for_down.read(gated.data());
    share(own.for_down, down, static_cast<T*>(y), hidden);
#pragma omp master
    std::memcpy(total, own.total.data(), batch * hidden * sizeof(T));
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
