#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "multiversion.h"

namespace vlcore {
namespace {

// Below this, waking a thread costs more than it brings.
constexpr int64_t kParallelElements = 1 << 15;
constexpr int64_t kMaxBlocks = 64;

VLCORE_CLONES float forward_row(const float* x, const float* weight, float* y, int64_t cols, float eps) {
  float square_sum = 0.f;
#pragma omp simd reduction(+ : square_sum)
  for (int64_t col = 0; col < cols; ++col) square_sum += x[col] * x[col];
  const float rstd = 1.f / std::sqrt(square_sum / static_cast<float>(cols) + eps);
#pragma omp simd
  for (int64_t col = 0; col < cols; ++col) y[col] = x[col] * rstd * weight[col];
  return rstd;
}

// With x_hat = x * rstd and g = grad_y * weight: grad_x = (g - x_hat * mean(g * x_hat)) * rstd.
VLCORE_CLONES void backward_row(const float* grad_y, const float* x, const float* weight, float rstd, float* grad_x,
                                float* grad_weight, int64_t cols) {
  float dot = 0.f;
#pragma omp simd reduction(+ : dot)
  for (int64_t col = 0; col < cols; ++col) dot += grad_y[col] * weight[col] * x[col];
  const float mean = dot * rstd / static_cast<float>(cols);
#pragma omp simd
  for (int64_t col = 0; col < cols; ++col) {
    const float x_hat = x[col] * rstd;
    grad_x[col] = (grad_y[col] * weight[col] - x_hat * mean) * rstd;
    grad_weight[col] += grad_y[col] * x_hat;
  }
}

VLCORE_CLONES void add_row(const float* row, double* total, int64_t cols) {
#pragma omp simd
  for (int64_t col = 0; col < cols; ++col) total[col] += row[col];
}

}  // namespace

void rms_norm_forward(const float* x, const float* weight, float* y, float* rstd, int64_t rows, int64_t cols,
                      float eps) {
#pragma omp parallel for if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    rstd[row] = forward_row(x + row * cols, weight, y + row * cols, cols, eps);
  }
}

void rms_norm_backward(const float* grad_y, const float* x, const float* weight, const float* rstd, float* grad_x,
                       float* grad_weight, int64_t rows, int64_t cols) {
  const int64_t block = std::max<int64_t>((rows + kMaxBlocks - 1) / kMaxBlocks, 8);
  const int64_t num_blocks = (rows + block - 1) / block;
  std::vector<float> partial(num_blocks * cols);
#pragma omp parallel for if (rows * cols >= kParallelElements)
  for (int64_t index = 0; index < num_blocks; ++index) {
    for (int64_t row = index * block; row < std::min(rows, (index + 1) * block); ++row) {
      const int64_t at = row * cols;
      backward_row(grad_y + at, x + at, weight, rstd[row], grad_x + at, partial.data() + index * cols, cols);
    }
  }
  std::vector<double> total(cols);
  for (int64_t index = 0; index < num_blocks; ++index) add_row(partial.data() + index * cols, total.data(), cols);
  std::copy(total.begin(), total.end(), grad_weight);
}

}  // namespace vlcore
