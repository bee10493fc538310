#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/add_rms_norm.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void add_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* total, int64_t rows,
                          int64_t cols, float eps, Target target) {
  VLCORE_RUN(target, add_rms_norm_forward, x, residual, weight, y, total, rows, cols, eps);
}

void add_rms_norm_backward(const void* grad_y, const void* grad_total, const void* total, const void* weight,
                           void* grad_sum, void* grad_weight, int64_t rows, int64_t cols, float eps, Target target) {
  VLCORE_RUN(target, add_rms_norm_backward, grad_y, grad_total, total, weight, grad_sum, grad_weight, rows, cols, eps);
}

}  // namespace vlcore

#else
#include "cpu/norm_rows.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void add_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* total,
                                 int64_t rows, int64_t cols, float eps) {
#pragma omp parallel for if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * cols;
    T* sum = static_cast<T*>(total) + at;
    add_row(static_cast<const T*>(x) + at, static_cast<const T*>(residual) + at, sum, cols);
    rms_norm_row<T>(sum, static_cast<const T*>(weight), static_cast<T*>(y) + at, cols, eps);
  }
}

template <typename T>
static void add_rms_norm_backward(const void* grad_y, const void* grad_total, const void* total, const void* weight,
                                  void* grad_sum, void* grad_weight, int64_t rows, int64_t cols, float eps) {
  sum_over_rows(rows, cols, rows * cols, static_cast<T*>(grad_weight), [&](int64_t row, float* sums) {
    const int64_t at = row * cols;
    rms_norm_backward_row(static_cast<const T*>(grad_y) + at, static_cast<const T*>(grad_total) + at,
                          static_cast<const T*>(total) + at, static_cast<const T*>(weight),
                          static_cast<T*>(grad_sum) + at, sums, cols, eps);
  });
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
