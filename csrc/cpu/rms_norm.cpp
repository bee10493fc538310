#include <algorithm>
#include <cmath>
#include <vector>

#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/rms_norm.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void rms_norm_forward(const void* x, const void* weight, void* y, float* rstd, int64_t rows, int64_t cols, float eps,
                      Target target) {
  VLCORE_RUN(target, rms_norm_forward, x, weight, y, rstd, rows, cols, eps);
}

void rms_norm_backward(const void* grad_y, const void* x, const void* weight, const float* rstd, void* grad_x,
                       void* grad_weight, int64_t rows, int64_t cols, Target target) {
  VLCORE_RUN(target, rms_norm_backward, grad_y, x, weight, rstd, grad_x, grad_weight, rows, cols);
}

}  // namespace vlcore

#else
namespace vlcore::VLCORE_LEVEL {

// Below this, waking a thread costs more than it brings.
constexpr int64_t kParallelElements = 1 << 15;
constexpr int64_t kMaxBlocks = 64;

template <typename T>
static float forward_row(const T* x, const T* weight, T* y, int64_t cols, float eps) {
  const int64_t whole = cols / kLanes * kLanes, rest = cols - whole;
  Vec squares = {};
  for (int64_t col = 0; col < whole; col += kLanes) squares += load(x + col) * load(x + col);
  if (rest) squares += load_first(x + whole, rest) * load_first(x + whole, rest);
  const float rstd = 1.f / std::sqrt(reduce_add(squares) / static_cast<float>(cols) + eps);
  for (int64_t col = 0; col < whole; col += kLanes) store(y + col, load(x + col) * rstd * load(weight + col));
  if (rest) store_first(y + whole, load_first(x + whole, rest) * rstd * load_first(weight + whole, rest), rest);
  return rstd;
}

template <typename T>
static void rms_norm_forward(const void* x, const void* weight, void* y, float* rstd, int64_t rows, int64_t cols,
                             float eps) {
#pragma omp parallel for if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    rstd[row] = forward_row(static_cast<const T*>(x) + row * cols, static_cast<const T*>(weight),
                            static_cast<T*>(y) + row * cols, cols, eps);
  }
}

// With x_hat = x * rstd and g = grad_y * weight: grad_x = (g - x_hat * mean(g * x_hat)) * rstd. Adds grad_y * x_hat to
// grad_weight.
template <typename T>
static void backward_row(const T* grad_y, const T* x, const T* weight, float rstd, T* grad_x, float* grad_weight,
                         int64_t cols) {
  const int64_t whole = cols / kLanes * kLanes, rest = cols - whole;
  Vec products = {};
  for (int64_t col = 0; col < whole; col += kLanes) {
    products += load(grad_y + col) * load(weight + col) * load(x + col);
  }
  if (rest) {
    products += load_first(grad_y + whole, rest) * load_first(weight + whole, rest) * load_first(x + whole, rest);
  }
  const float mean = reduce_add(products) * rstd / static_cast<float>(cols);
  for (int64_t col = 0; col < whole; col += kLanes) {
    const Vec x_hat = load(x + col) * rstd, grad = load(grad_y + col);
    store(grad_x + col, (grad * load(weight + col) - x_hat * mean) * rstd);
    store(grad_weight + col, load(grad_weight + col) + grad * x_hat);
  }
  if (rest) {
    const Vec x_hat = load_first(x + whole, rest) * rstd, grad = load_first(grad_y + whole, rest);
    store_first(grad_x + whole, (grad * load_first(weight + whole, rest) - x_hat * mean) * rstd, rest);
    store_first(grad_weight + whole, load_first(grad_weight + whole, rest) + grad * x_hat, rest);
  }
}

template <typename T>
static void rms_norm_backward(const void* grad_y, const void* x, const void* weight, const float* rstd, void* grad_x,
                              void* grad_weight, int64_t rows, int64_t cols) {
  const int64_t block = std::max<int64_t>((rows + kMaxBlocks - 1) / kMaxBlocks, 8);
  const int64_t num_blocks = (rows + block - 1) / block;
  std::vector<float> partial(num_blocks * cols);
#pragma omp parallel for if (rows * cols >= kParallelElements)
  for (int64_t index = 0; index < num_blocks; ++index) {
    for (int64_t row = index * block; row < std::min(rows, (index + 1) * block); ++row) {
      const int64_t at = row * cols;
      backward_row(static_cast<const T*>(grad_y) + at, static_cast<const T*>(x) + at, static_cast<const T*>(weight),
                   rstd[row], static_cast<T*>(grad_x) + at, partial.data() + index * cols, cols);
    }
  }
  std::vector<double> total(cols);
  for (int64_t index = 0; index < num_blocks; ++index) {
    for (int64_t col = 0; col < cols; ++col) total[col] += partial[index * cols + col];
  }
  for (int64_t col = 0; col < cols; ++col) {
    static_cast<T*>(grad_weight)[col] = convert<T>(static_cast<float>(total[col]));
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
