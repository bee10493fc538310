#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/linear.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void linear_forward(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t outputs,
                    int64_t inputs, Target target) {
  VLCORE_RUN(target, linear_forward, x, weight, bias, y, rows, outputs, inputs);
}

}  // namespace vlcore

#else
#include "cpu/few_rows.h"

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

}  // namespace vlcore::VLCORE_LEVEL
#endif
