#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>

#include "kernels.h"

namespace py = pybind11;

namespace {

// Tensors cross as their addresses, which their method data_ptr() tells, and None as null: so this extension needs no
// torch to build and fits every torch. A target crosses as two numbers, which the caller appends.
template <typename T>
struct Crossing {
  using Given = T;
  static T take(T given) { return given; }
};

template <typename T>
struct Crossing<T*> {
  using Given = py::handle;
  static T* take(py::handle tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (tensor.is_none()) return nullptr;
    const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    if (!address) throw py::error_already_set();
    return static_cast<T*>(PyLong_AsVoidPtr(address.ptr()));
  }
};

template <>
struct Crossing<vlcore::Target> {
  using Given = std::pair<int, int>;
  static vlcore::Target take(Given given) {
    return {static_cast<vlcore::DType>(given.first), static_cast<vlcore::Level>(given.second)};
  }
};

template <>
struct Crossing<vlcore::Heads> {
  using Given = std::tuple<py::handle, int64_t, int64_t, int64_t>;
  static vlcore::Heads take(Given given) {
    const auto [tensor, batch_stride, token_stride, head_stride] = given;
    return {Crossing<const void*>::take(tensor), batch_stride, token_stride, head_stride};
  }
};

template <>
struct Crossing<vlcore::Weight> {
  using Given = std::tuple<py::handle, py::handle, int64_t, int>;
  static vlcore::Weight take(Given given) {
    const auto [values, scales, groups, bits] = given;
    return {Crossing<const void*>::take(values), Crossing<const float*>::take(scales), groups, bits};
  }
};

template <typename... Arguments>
void bind(py::module_& m, const char* name, void (*kernel)(Arguments...)) {
  m.def(name, [kernel](typename Crossing<Arguments>::Given... given) {
    const std::tuple<Arguments...> taken{Crossing<Arguments>::take(given)...};
    py::gil_scoped_release unlocked;
    std::apply(kernel, taken);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("best_level", [] { return static_cast<int>(vlcore::best_level()); });
  m.def("multiplies_tiles", vlcore::multiplies_tiles);
  bind(m, "prefer_huge_pages", vlcore::prefer_huge_pages);
  bind(m, "rms_norm_forward", vlcore::rms_norm_forward);
  bind(m, "rms_norm_backward", vlcore::rms_norm_backward);
  bind(m, "add_rms_norm_forward", vlcore::add_rms_norm_forward);
  bind(m, "add_rms_norm_backward", vlcore::add_rms_norm_backward);
  bind(m, "layer_norm_forward", vlcore::layer_norm_forward);
  bind(m, "layer_norm_backward", vlcore::layer_norm_backward);
  bind(m, "swiglu_forward", vlcore::swiglu_forward);
  bind(m, "swiglu_backward", vlcore::swiglu_backward);
  bind(m, "rel_pos_attention_forward", vlcore::rel_pos_attention_forward);
  bind(m, "rel_pos_attention_backward", vlcore::rel_pos_attention_backward);
  bind(m, "window_attention_forward", vlcore::window_attention_forward);
  bind(m, "apply_rope", vlcore::apply_rope);
  bind(m, "attention_forward", vlcore::attention_forward);
  bind(m, "attention_backward", vlcore::attention_backward);
  bind(m, "window_attention_backward", vlcore::window_attention_backward);
  bind(m, "linear_forward", vlcore::linear_forward);
  bind(m, "linear_blocked_forward", vlcore::linear_blocked_forward);
  bind(m, "linear_grad_x", vlcore::linear_grad_x);
  bind(m, "linear_grad_weight", vlcore::linear_grad_weight);
  bind(m, "quantized_linear_forward", vlcore::quantized_linear_forward);
  bind(m, "dequantize", vlcore::dequantize);
  bind(m, "decode_attention_forward", vlcore::decode_attention_forward);
  bind(m, "softmax_block", vlcore::softmax_block);
  bind(m, "add_scaled_rows", vlcore::add_scaled_rows);
  bind(m, "cross_entropy_grad_hidden", vlcore::cross_entropy_grad_hidden);
  bind(m, "cross_entropy_grad_logits", vlcore::cross_entropy_grad_logits);
  bind(m, "decode_block_forward", vlcore::decode_block_forward);
  bind(m, "merge_and_resize_forward", vlcore::merge_and_resize_forward);
  bind(m, "merge_and_resize_backward", vlcore::merge_and_resize_backward);
}
