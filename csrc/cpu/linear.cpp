#if defined(_OPENMP)
#include <omp.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>

#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/linear.cpp"
#define VLCORE_MULTIPLIES_TILES
#include "cpu/for_each_level.h"

namespace vlcore {

void linear_forward(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t outputs,
                    int64_t inputs, Target target) {
  VLCORE_RUN(target, linear_forward, x, weight, bias, y, rows, outputs, inputs);
}

void linear_blocked_forward(const void* x, const void* weight, const void* bias, const void* residual, void* y,
                            int64_t rows, int64_t outputs, int64_t inputs, int64_t y_stride, bool gelu, Target target) {
  VLCORE_RUN(target, linear_blocked_forward, x, weight, bias, residual, y, rows, outputs, inputs, y_stride, gelu);
}

void linear_grad_x(const void* grad_y, const void* weight, void* grad_x, int64_t rows, int64_t outputs, int64_t inputs,
                   Target target) {
  VLCORE_RUN(target, linear_grad_x, grad_y, weight, grad_x, rows, outputs, inputs);
}

void linear_grad_weight(const void* grad_y, const void* x, void* grad_weight, int64_t rows, int64_t outputs,
                        int64_t inputs, Target target) {
  VLCORE_RUN(target, linear_grad_weight, grad_y, x, grad_weight, rows, outputs, inputs);
}

}  // namespace vlcore

#else
#include "cpu/few_rows.h"
#include "cpu/gelu.h"
#include "cpu/matrix_product.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void linear_forward(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t outputs,
                           int64_t inputs) {
#pragma omp parallel for schedule(static) if (outputs * inputs >= kParallelWeights)
  for (int64_t first = 0; first < outputs; first += kOutputBlock) {
    multiply_rows(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                  static_cast<T*>(y), rows, outputs, inputs, first, std::min(first + kOutputBlock, outputs));
  }
}

template <typename T>
static auto write_to(void* c, int64_t stride) {
  return [=](int64_t row, int64_t col, int64_t cols, float* sums) {
    T* to = static_cast<T*>(c) + row * stride + col;
    for_vecs(cols, [&](int64_t i, auto lanes) VLCORE_INLINED { store(to + i, load(sums + i, lanes), lanes); });
  };
}

template <typename T>
static void linear_blocked_forward(const void* x, const void* weight, const void* bias, const void* residual, void* y,
                                   int64_t rows, int64_t outputs, int64_t inputs, int64_t y_stride, bool gelu) {
  const View<T> from{static_cast<const T*>(x), inputs, 1}, transposed{static_cast<const T*>(weight), 1, inputs};
  // With less to look at for each row it is several percent faster.
  if (!bias && !residual && !gelu) {
    return matrix_product(from, transposed, rows, outputs, inputs, write_to<T>(y, y_stride));
  }
  matrix_product(from, transposed, rows, outputs, inputs, [=](int64_t row, int64_t col, int64_t cols, float* sums) {
    T* to = static_cast<T*>(y) + row * y_stride + col;
    for_vecs(cols, [&](int64_t i, auto lanes) VLCORE_INLINED {
      Vec value = load(sums + i, lanes);
      if (bias) value += load(static_cast<const T*>(bias) + col + i, lanes);
      if (gelu) value = VLCORE_LEVEL::gelu(value);
      if (residual) value += load(static_cast<const T*>(residual) + row * outputs + col + i, lanes);
      store(to + i, value, lanes);
    });
  });
}

template <typename T>
static void linear_grad_x(const void* grad_y, const void* weight, void* grad_x, int64_t rows, int64_t outputs,
                          int64_t inputs) {
  const View<T> from{static_cast<const T*>(grad_y), outputs, 1}, by{static_cast<const T*>(weight), inputs, 1};
  matrix_product(from, by, rows, inputs, outputs, write_to<T>(grad_x, inputs));
}

template <typename T>
static void linear_grad_weight(const void* grad_y, const void* x, void* grad_weight, int64_t rows, int64_t outputs,
                               int64_t inputs) {
  const View<T> transposed{static_cast<const T*>(grad_y), 1, outputs}, by{static_cast<const T*>(x), inputs, 1};
  matrix_product(transposed, by, outputs, inputs, rows, write_to<T>(grad_weight, inputs));
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
