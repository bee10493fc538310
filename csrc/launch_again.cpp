// To find a kernel that has been launched before and to call it takes Python as long as a small kernel runs, and here a
// third of that.
#include "launch_again.h"

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "signature.h"

namespace vlcore {
namespace {

namespace py = pybind11;

// The parts of what kernels/direct_launch.py keeps, in its order.
enum Kept { launcher, function, packed_metadata, constants };

py::object checked(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// Of tensors and None: their addresses and dtypes, None for None.
struct Given {
  explicit Given(const py::tuple& tensors) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const dtype = PyUnicode_InternFromString("dtype");
    for (const py::handle tensor : tensors) {
      if (tensor.is_none()) {
        addresses.push_back(py::none());
        dtypes.push_back(py::none());
        continue;
      }
      addresses.push_back(checked(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr)));
      dtypes.push_back(checked(PyObject_GetAttr(tensor.ptr(), dtype)));
      together |= reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(addresses.back().ptr()));
      if (PyErr_Occurred()) throw py::error_already_set();
    }
  }

  std::vector<py::object> addresses, dtypes;
  uintptr_t together = 0;
};

// Numbers are told apart as they are, though Triton asks only for some of their properties, and 1 from 1.0 and True by
// their types.
py::tuple key_of(py::handle kernel, py::handle device, const Given& given, const py::tuple& numbers,
                 const py::dict& settings) {
  py::tuple key(2 + given.dtypes.size() + 2 * numbers.size() + 2 * settings.size());
  Py_ssize_t at = 0;
  // A tuple takes what it is given for its own.
  const auto add = [&](py::handle part) { PyTuple_SET_ITEM(key.ptr(), at++, part.inc_ref().ptr()); };
  add(checked(PyLong_FromVoidPtr(kernel.ptr())));
  add(device);
  for (const py::object& dtype : given.dtypes) add(dtype);
  for (const py::handle number : numbers) {
    add(number);
    add(py::type::handle_of(number));
  }
  for (const auto [name, value] : settings) {
    add(name);
    add(value);
  }
  return key;
}

// As Triton calls its launchers, with no metadata of the launch and no hooks.
void call(const py::tuple& kept, const py::tuple& grid, py::handle stream, const std::vector<py::object>& pointers,
          const py::tuple& numbers) {
  static PyObject* const one = PyLong_FromLong(1);
  const auto part = [&](Kept which) { return PyTuple_GET_ITEM(kept.ptr(), which); };
  std::vector<PyObject*> arguments;
  arguments.reserve(64);
  for (size_t axis = 0; axis < 3; ++axis) {
    arguments.push_back(axis < grid.size() ? PyTuple_GET_ITEM(grid.ptr(), axis) : one);
  }
  for (PyObject* next : {stream.ptr(), part(function), part(packed_metadata), Py_None, Py_None, Py_None}) {
    arguments.push_back(next);
  }
  for (const py::object& pointer : pointers) arguments.push_back(pointer.ptr());
  for (const py::handle number : numbers) arguments.push_back(number.ptr());
  for (const py::handle constant : py::reinterpret_borrow<py::tuple>(part(constants))) {
    arguments.push_back(constant.ptr());
  }
  checked(PyObject_Vectorcall(part(launcher), arguments.data(), arguments.size(), nullptr));
}

}  // namespace

py::object launch_again(const py::dict& kept, py::handle kernel, py::handle device, py::handle stream,
                        const py::tuple& grid, const py::tuple& tensors, const py::tuple& numbers,
                        const py::dict& settings) {
  const Given given(tensors);
  if (given.together % 16) return py::tuple();
  const py::tuple key = key_of(kernel, device, given, numbers, settings);
  // Another thread may forget it meanwhile.
  const auto found = py::reinterpret_borrow<py::tuple>(PyDict_GetItemWithError(kept.ptr(), key.ptr()));
  if (!found) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return key;
  }
  call(found, grid, stream, given.addresses, numbers);
  return found;
}

bool launch_all(const py::tuple& launches, py::handle stream, const py::tuple& arguments) {
  std::vector<std::optional<uintptr_t>> begins;
  begins.reserve(arguments.size());
  for (const py::handle argument : arguments) {
    begins.push_back(address_of(argument));
    if (begins.back().value_or(0) % 16) return false;
  }
  for (const py::handle launch : launches) {
    const auto [kept, grid, places, numbers] = launch.cast<std::tuple<py::tuple, py::tuple, py::tuple, py::tuple>>();
    std::vector<py::object> pointers;
    for (const py::handle given : places) {
      const auto [place, offset] = given.cast<std::pair<size_t, size_t>>();
      const std::optional<uintptr_t> begin = begins.at(place);
      pointers.push_back(begin ? checked(PyLong_FromSize_t(*begin + offset)) : py::none());
    }
    call(kept, grid, stream, pointers, numbers);
  }
  return true;
}

}  // namespace vlcore
