#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/layer_norm.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void layer_norm_forward(const void* x, const void* weight, const void* bias, void* y, float* statistics, int64_t rows,
                        int64_t cols, float eps, Target target) {
  VLCORE_RUN(target, layer_norm_forward, x, weight, bias, y, statistics, rows, cols, eps);
}

void layer_norm_backward(const void* grad_y, const void* x, const void* weight, const float* statistics, void* grad_x,
                         void* grad_weight_and_bias, int64_t rows, int64_t cols, Target target) {
  VLCORE_RUN(target, layer_norm_backward, grad_y, x, weight, statistics, grad_x, grad_weight_and_bias, rows, cols);
}

}  // namespace vlcore

#else
#include "cpu/norm_rows.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void layer_norm_row(const T* x, const T* weight, const T* bias, T* y, float& mean, float& rstd, int64_t cols,
                           float eps) {
  const Vec sum = sum_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED { return load(x + col, lanes); });
  mean = reduce_add(sum) / static_cast<float>(cols);
  // The deviations' squares in a second pass: E[x^2] - mean^2 would cancel.
  float squares = 0.f;
  const int64_t whole = cols / kLanes * kLanes;
  const Vec whole_squares = sum_vecs(whole, [&](int64_t col, auto lanes) VLCORE_INLINED {
    const Vec deviation = load(x + col, lanes) - mean;
    ask_for(x + cols + col);
    ask_to_write(y + col);
    return deviation * deviation;
  });
  for (int64_t col = whole; col < cols; ++col) {
    const float deviation = static_cast<float>(x[col]) - mean;
    squares += deviation * deviation;
  }
  rstd = reciprocal_norm(reduce_add(whole_squares) + squares, cols, eps);
  for_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
    store(y + col, (load(x + col, lanes) - mean) * rstd * load(weight + col, lanes) + load(bias + col, lanes), lanes);
  });
}

// With x_hat = (x - mean) * rstd and g = grad_y * weight: grad_x = (g - mean(g) - x_hat * mean(g * x_hat)) * rstd. Adds
// grad_y * x_hat and grad_y to the gradients of weight and bias.
template <typename T>
static void layer_norm_backward_row(const T* grad_y, const T* x, const T* weight, float mean, float rstd, T* grad_x,
                                    float* grad_weight, float* grad_bias, int64_t cols) {
  const TwoVecs sums = sum_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
    const Vec grad = load(grad_y + col, lanes) * load(weight + col, lanes);
    ask_to_write(grad_x + col);
    return TwoVecs{grad, grad * (load(x + col, lanes) - mean)};
  });
  const float mean_grad = reduce_add(sums.first) / static_cast<float>(cols);
  const float mean_product = reduce_add(sums.second) * rstd / static_cast<float>(cols);
  for_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
    const Vec x_hat = (load(x + col, lanes) - mean) * rstd, grad = load(grad_y + col, lanes);
    ask_for(x + cols + col);
    ask_for(grad_y + cols + col);
    store(grad_x + col, (grad * load(weight + col, lanes) - mean_grad - x_hat * mean_product) * rstd, lanes);
    store(grad_weight + col, load(grad_weight + col, lanes) + grad * x_hat, lanes);
    store(grad_bias + col, load(grad_bias + col, lanes) + grad, lanes);
  });
}

template <typename T>
static void layer_norm_forward(const void* x, const void* weight, const void* bias, void* y, float* statistics,
                               int64_t rows, int64_t cols, float eps) {
#pragma omp parallel for if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    float mean, rstd;
    layer_norm_row(static_cast<const T*>(x) + row * cols, static_cast<const T*>(weight), static_cast<const T*>(bias),
                   static_cast<T*>(y) + row * cols, mean, rstd, cols, eps);
    if (statistics == nullptr) continue;
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = rstd;
  }
}

template <typename T>
static void layer_norm_backward(const void* grad_y, const void* x, const void* weight, const float* statistics,
                                void* grad_x, void* grad_weight_and_bias, int64_t rows, int64_t cols) {
  auto* grads = static_cast<T*>(grad_weight_and_bias);
  sum_over_rows(rows, 2 * cols, rows * cols, grads, [&](int64_t row, float* sums) {
    const int64_t at = row * cols;
    layer_norm_backward_row(static_cast<const T*>(grad_y) + at, static_cast<const T*>(x) + at,
                            static_cast<const T*>(weight), statistics[2 * row], statistics[2 * row + 1],
                            static_cast<T*>(grad_x) + at, sums, sums + cols, cols);
  });
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
