#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/linear_cross_entropy.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void softmax_block(const void* logits, const int64_t* labels, void* numerators, float* largest, float* sum,
                   float* label_logit, float* factor, int64_t first, int64_t words, int64_t rows, Target target) {
  VLCORE_RUN(target, softmax_block, logits, labels, numerators, largest, sum, label_logit, factor, first, words, rows);
}

void add_scaled_rows(const void* block, const float* factor, float* sums, int64_t rows, int64_t cols, Target target) {
  VLCORE_RUN(target, add_scaled_rows, block, factor, sums, rows, cols);
}

void cross_entropy_grad_hidden(const float* sums, const float* sum, const float* row_scale, const int64_t* labels,
                               const void* weight, void* grad_hidden, int64_t rows, int64_t cols, Target target) {
  VLCORE_RUN(target, cross_entropy_grad_hidden, sums, sum, row_scale, labels, weight, grad_hidden, rows, cols);
}

void cross_entropy_grad_logits(const void* logits, const int64_t* labels, const float* largest, const float* sum,
                               const float* row_scale, void* grad_logits, int64_t grad_stride, int64_t first,
                               int64_t words, int64_t rows, Target target) {
  VLCORE_RUN(target, cross_entropy_grad_logits, logits, labels, largest, sum, row_scale, grad_logits, grad_stride,
             first, words, rows);
}

}  // namespace vlcore

#else
namespace vlcore::VLCORE_LEVEL {

// Rows stand side by side in logits (words, rows): a vector holds as many of them, and no sum goes across its lanes. A
// thread takes a strip of kStrip rows, two cache lines of float.
constexpr int64_t kStrip = 32;

template <typename T>
static void softmax_strip(const T* logits, T* numerators, float* largest, float* sum, float* factor, int64_t words,
                          int64_t rows, int64_t width) {
  for_vecs(width, [&](int64_t row, auto lanes) VLCORE_INLINED {
    const Vec before = load(largest + row, lanes);
    Vec most = before;
    for (int64_t word = 0; word < words; ++word) most = maximum(load(logits + word * rows + row, lanes), most);
    const Vec shrunk = exp(before - most);
    Vec total = {};
    for (int64_t word = 0; word < words; ++word) {
      const Vec numerator = exp(load(logits + word * rows + row, lanes) - most);
      total += numerator;
      if (numerators) store(numerators + word * rows + row, numerator, lanes);
    }
    store(largest + row, most, lanes);
    store(factor + row, shrunk, lanes);
    store(sum + row, load(sum + row, lanes) * shrunk + total, lanes);
  });
}

template <typename T>
static void softmax_block(const void* logits, const int64_t* labels, void* numerators, float* largest, float* sum,
                          float* label_logit, float* factor, int64_t first, int64_t words, int64_t rows) {
  const T* from = static_cast<const T*>(logits);
  // Before the numerators, which may take the place of the logits.
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t word = labels[row] - first;
    if (word >= 0 && word < words) label_logit[row] = static_cast<float>(from[word * rows + row]);
  }
#pragma omp parallel for if (words * rows >= (1 << 15))
  for (int64_t row = 0; row < rows; row += kStrip) {
    T* to = numerators ? static_cast<T*>(numerators) + row : nullptr;
    softmax_strip(from + row, to, largest + row, sum + row, factor + row, words, rows, std::min(kStrip, rows - row));
  }
}

template <typename T>
static void add_scaled_rows(const void* block, const float* factor, float* sums, int64_t rows, int64_t cols) {
#pragma omp parallel for if (rows * cols >= (1 << 15))
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(block) + row * cols;
    float* to = sums + row * cols;
    for_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
      store(to + col, load(to + col, lanes) * factor[row] + load(from + col, lanes), lanes);
    });
  }
}

template <typename T>
static void cross_entropy_grad_hidden(const float* sums, const float* sum, const float* row_scale,
                                      const int64_t* labels, const void* weight, void* grad_hidden, int64_t rows,
                                      int64_t cols) {
#pragma omp parallel for if (rows * cols >= (1 << 15))
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = sums + row * cols;
    const T* label = static_cast<const T*>(weight) + labels[row] * cols;
    T* to = static_cast<T*>(grad_hidden) + row * cols;
    for_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
      store(to + col, (load(from + col, lanes) / sum[row] - load(label + col, lanes)) * row_scale[row], lanes);
    });
  }
}

template <typename T>
static void cross_entropy_grad_logits(const void* logits, const int64_t* labels, const float* largest, const float* sum,
                                      const float* row_scale, void* grad_logits, int64_t grad_stride, int64_t first,
                                      int64_t words, int64_t rows) {
#pragma omp parallel for if (words * rows >= (1 << 15))
  for (int64_t start = 0; start < rows; start += kStrip) {
    const T* from = static_cast<const T*>(logits);
    T* to = static_cast<T*>(grad_logits);
    const int64_t end = std::min(rows, start + kStrip);
    float factors[kStrip];
    for (int64_t row = start; row < end; ++row) factors[row - start] = row_scale[row] / sum[row];
    for (int64_t word = 0; word < words; ++word) {
      for_vecs(end - start, [&](int64_t at, auto lanes) VLCORE_INLINED {
        const int64_t row = start + at;
        const Vec numerator = exp(load(from + word * rows + row, lanes) - load(largest + row, lanes));
        store(to + word * grad_stride + row, numerator * load(factors + at, lanes), lanes);
      });
    }
    for (int64_t row = start; row < end; ++row) {
      const int64_t word = labels[row] - first;
      if (word < 0 || word >= words) continue;
      const float numerator = std::exp(static_cast<float>(from[word * rows + row]) - largest[row]);
      to[word * grad_stride + row] = convert<T>((numerator / sum[row] - 1.f) * row_scale[row]);
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
