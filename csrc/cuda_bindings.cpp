#include <pybind11/stl.h>

#include <utility>

#include "crossing.h"
#include "cuda_kernels.h"

namespace vlcore {

// A queue crosses as two numbers, which the caller appends.
template <>
struct Crossing<cuda::Queue> {
  using Given = std::pair<int, uintptr_t>;
  static cuda::Queue take(Given given) {
    return {static_cast<cuda::DType>(given.first), reinterpret_cast<void*>(given.second)};
  }
};

}  // namespace vlcore

PYBIND11_MODULE(_cuda, m) {
  using vlcore::bind;
  // What setup.py compiled for.
  m.attr("architectures") = VLCORE_CUDA_ARCHS;
  bind(m, "quantized_linear_forward", vlcore::cuda::quantized_linear_forward);
  bind(m, "decode_attention_forward", vlcore::cuda::decode_attention_forward);
}
