#pragma once
#include <cstdint>

// Kernels on raw pointers: no torch, no Python. All matrices are row-major and contiguous.
namespace vlcore {

// x, y (rows, cols); weight (cols); rstd (rows).
void rms_norm_forward(const float* x, const float* weight, float* y, float* rstd, int64_t rows, int64_t cols,
                      float eps);

// grad_weight (cols) is summed in an order that depends on the shape alone, not on the number of threads.
void rms_norm_backward(const float* grad_y, const float* x, const float* weight, const float* rstd, float* grad_x,
                       float* grad_weight, int64_t rows, int64_t cols);

}  // namespace vlcore
