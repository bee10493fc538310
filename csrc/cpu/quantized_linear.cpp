#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/quantized_linear.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void quantized_linear_forward(const void* x, const void* values, const float* scales, const void* bias, void* y,
                              int64_t rows, int64_t outputs, int64_t inputs, int64_t groups, int bits, Target target) {
  VLCORE_RUN(target, quantized_linear_forward, x, values, scales, bias, y, rows, outputs, inputs, groups, bits);
}

void dequantize(const void* values, const float* scales, void* weight, int64_t outputs, int64_t inputs, int64_t groups,
                int bits, Target target) {
  VLCORE_RUN(target, dequantize, values, scales, weight, outputs, inputs, groups, bits);
}

}  // namespace vlcore

#else
#include "cpu/few_rows.h"
#include "cpu/quantized_bytes.h"
#include "cpu/quantized_rows.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void quantized_linear_forward(const void* x, const void* values, const float* scales, const void* bias, void* y,
                                     int64_t rows, int64_t outputs, int64_t inputs, int64_t groups, int bits) {
  QuantizedRows<T> from(rows, inputs, groups, bits);
  from.read(static_cast<const T*>(x));
#pragma omp parallel for schedule(static) if (outputs * inputs >= kParallelWeights)
  for (int64_t first = 0; first < outputs; first += kOutputBlock) {
    from.multiply(static_cast<const uint8_t*>(values), scales, static_cast<const T*>(bias), static_cast<T*>(y), outputs,
                  first, std::min(first + kOutputBlock, outputs));
  }
}

template <typename T>
static void dequantize(const void* values, const float* scales, void* weight, int64_t outputs, int64_t inputs,
                       int64_t groups, int bits) {
  const int64_t bytes = bits == 8 ? inputs : (inputs + 1) / 2;
#pragma omp parallel for schedule(static) if (outputs * inputs >= kParallelWeights)
  for (int64_t row = 0; row < outputs; ++row) {
    dequantize_row(static_cast<const uint8_t*>(values) + row * bytes, scales + row * groups,
                   static_cast<T*>(weight) + row * inputs, inputs, groups, bits);
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif
