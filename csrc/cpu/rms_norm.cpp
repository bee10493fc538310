#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/rms_norm.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void rms_norm_forward(const void* x, const void* weight, void* y, int64_t rows, int64_t cols, float eps,
                      Target target) {
  VLCORE_RUN(target, rms_norm_forward, x, weight, y, rows, cols, eps);
}

void rms_norm_backward(const void* grad_y, const void* x, const void* weight, void* grad_x, void* grad_weight,
                       int64_t rows, int64_t cols, float eps, Target target) {
  VLCORE_RUN(target, rms_norm_backward, grad_y, x, weight, grad_x, grad_weight, rows, cols, eps);
}

}  // namespace vlcore

#else
#include "cpu/norm_rows.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void rms_norm_forward(const void* x, const void* weight, void* y, int64_t rows, int64_t cols, float eps) {
#pragma omp parallel for if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    rms_norm_row(static_cast<const T*>(x) + row * cols, static_cast<const T*>(weight), static_cast<T*>(y) + row * cols,
                 cols, eps);
  }
}

template <typename T>
static void rms_norm_backward(const void* grad_y, const void* x, const void* weight, void* grad_x, void* grad_weight,
                              int64_t rows, int64_t cols, float eps) {
  sum_over_rows(rows, cols, rows * cols, static_cast<T*>(grad_weight), [&](int64_t row, float* sums) {
    const int64_t at = row * cols;
    rms_norm_backward_row<T>(static_cast<const T*>(grad_y) + at, nullptr, static_cast<const T*>(x) + at,
                             static_cast<const T*>(weight), static_cast<T*>(grad_x) + at, sums, cols, eps);
  });
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
