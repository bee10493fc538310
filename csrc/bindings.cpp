#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

// Tensors cross as addresses (Tensor.data_ptr()), so this extension needs no torch to build and fits every torch.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_C, m) {
  m.def("rms_norm_forward",
        [](uintptr_t x, uintptr_t weight, uintptr_t y, uintptr_t rstd, int64_t rows, int64_t cols, float eps) {
          py::gil_scoped_release unlocked;
          vlcore::rms_norm_forward(at<const float>(x), at<const float>(weight), at<float>(y), at<float>(rstd), rows,
                                   cols, eps);
        });
  m.def("rms_norm_backward", [](uintptr_t grad_y, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t grad_x,
                                uintptr_t grad_weight, int64_t rows, int64_t cols) {
    py::gil_scoped_release unlocked;
    vlcore::rms_norm_backward(at<const float>(grad_y), at<const float>(x), at<const float>(weight),
                              at<const float>(rstd), at<float>(grad_x), at<float>(grad_weight), rows, cols);
  });
}
