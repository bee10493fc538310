#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "crossing.h"
#include "kernels.h"
#include "launch_again.h"
#include "signature.h"

namespace py = pybind11;

namespace vlcore {

// A target crosses as two numbers, which the caller appends.
template <>
struct Crossing<Target> {
  using Given = std::pair<int, int>;
  static Target take(Given given) { return {static_cast<DType>(given.first), static_cast<Level>(given.second)}; }
};

template <>
struct Crossing<Heads> {
  using Given = std::tuple<py::handle, int64_t, int64_t, int64_t>;
  static Heads take(Given given) {
    const auto [tensor, batch_stride, token_stride, head_stride] = given;
    return {Crossing<const void*>::take(tensor), batch_stride, token_stride, head_stride};
  }
};

template <>
struct Crossing<Weight> {
  using Given = std::tuple<py::handle, py::handle, int64_t, int>;
  static Weight take(Given given) {
    const auto [values, scales, groups, bits] = given;
    return {Crossing<const void*>::take(values), Crossing<const float*>::take(scales), groups, bits};
  }
};

}  // namespace vlcore

PYBIND11_MODULE(_C, m) {
  using vlcore::bind;
  m.def("best_level", [] { return static_cast<int>(vlcore::best_level()); });
  m.def("launch_again", vlcore::launch_again);
  py::class_<vlcore::Repetition>(m, "Repetition")
      .def(py::init<py::tuple, std::vector<size_t>, bool>())
      .def("__call__", &vlcore::Repetition::operator());
  m.def("look_at_tensors_by", vlcore::look_at_tensors_by);
  m.def("signature", vlcore::signature);
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
