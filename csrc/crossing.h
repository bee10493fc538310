#pragma once
#include <pybind11/pybind11.h>

#include <tuple>

namespace vlcore {

// Tensors cross from Python as their addresses, which their method data_ptr() tells, and None as null: so an extension
// needs no torch to build and fits every torch.
template <typename T>
struct Crossing {
  using Given = T;
  static T take(T given) { return given; }
};

template <typename T>
struct Crossing<T*> {
  using Given = pybind11::handle;
  static T* take(pybind11::handle tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (tensor.is_none()) return nullptr;
    const auto address =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    if (!address) throw pybind11::error_already_set();
    return static_cast<T*>(PyLong_AsVoidPtr(address.ptr()));
  }
};

template <typename... Arguments>
void bind(pybind11::module_& m, const char* name, void (*kernel)(Arguments...)) {
  m.def(name, [kernel](typename Crossing<Arguments>::Given... given) {
    const std::tuple<Arguments...> taken{Crossing<Arguments>::take(given)...};
    pybind11::gil_scoped_release unlocked;
    std::apply(kernel, taken);
  });
}

}  // namespace vlcore
