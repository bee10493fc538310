// To find a kernel that has been launched before and to call it takes Python as long as a small kernel runs, and here a
// third of that.
#include "launch_again.h"

#include <pybind11/stl.h>

#include <algorithm>
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

}  // namespace

Launch::Launch(const py::tuple& kept, const py::tuple& grid, size_t num_tensors, const py::tuple& numbers)
    : launcher_(kept[launcher]) {
  const auto add = [&](py::handle next) { arguments_.push_back(py::reinterpret_borrow<py::object>(next)); };
  for (size_t axis = 0; axis < 3; ++axis) add(axis < grid.size() ? py::object(grid[axis]) : py::int_(1));
  stream_ = arguments_.size();
  add({});
  add(kept[function]);
  add(kept[packed_metadata]);
  for (int i = 0; i < 3; ++i) add(py::none());
  pointers_ = arguments_.size();
  arguments_.resize(pointers_ + num_tensors);
  for (const py::handle number : numbers) add(number);
  for (const py::handle constant : py::tuple(kept[constants])) add(constant);
}

void Launch::operator()(py::handle stream, const std::vector<py::object>& pointers) const {
  const auto handed_over = [](const py::object& argument) { return argument.ptr(); };
  std::vector<PyObject*> arguments(arguments_.size());
  std::transform(arguments_.begin(), arguments_.end(), arguments.begin(), handed_over);
  arguments[stream_] = stream.ptr();
  std::transform(pointers.begin(), pointers.end(), arguments.begin() + pointers_, handed_over);
  checked(PyObject_Vectorcall(launcher_.ptr(), arguments.data(), arguments.size(), nullptr));
}

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
  Launch(found, grid, given.addresses.size(), numbers)(stream, given.addresses);
  return found;
}

Repetition::Repetition(const py::tuple& launches, std::vector<size_t> given_back, bool alone)
    : given_back_(std::move(given_back)), alone_(alone) {
  for (const py::handle launch : launches) {
    auto [kept, grid, places, numbers] = launch.cast<std::tuple<py::tuple, py::tuple, std::vector<Place>, py::tuple>>();
    launches_.emplace_back(Launch(kept, grid, places.size(), numbers), std::move(places));
  }
}

py::object Repetition::operator()(py::handle stream, const py::tuple& allocations, const py::args& arguments) const {
  std::vector<py::object> whole;
  whole.reserve(arguments.size() + allocations.size() + 1);
  for (const py::handle argument : arguments) whole.push_back(py::reinterpret_borrow<py::object>(argument));
  for (const py::handle allocate : allocations) whole.push_back(checked(PyObject_CallNoArgs(allocate.ptr())));
  whole.push_back(py::none());

  std::vector<std::optional<uintptr_t>> begins;
  begins.reserve(whole.size());
  for (const py::object& each : whole) {
    begins.push_back(address_of(each));
    if (begins.back().value_or(0) % 16) return py::none();
  }
  std::vector<py::object> pointers;
  for (const auto& [launch, places] : launches_) {
    pointers.clear();
    for (const auto& [place, offset] : places) {
      const std::optional<uintptr_t> begin = begins.at(place);
      pointers.push_back(begin ? checked(PyLong_FromSize_t(*begin + offset)) : py::none());
    }
    launch(stream, pointers);
  }
  if (alone_) return whole.at(given_back_.front());
  py::tuple results(given_back_.size());
  for (size_t i = 0; i < given_back_.size(); ++i) results[i] = whole.at(given_back_[i]);
  return results;
}

}  // namespace vlcore
