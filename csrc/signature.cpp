// What follows from how arguments look need not be computed for every call that looks alike. Asked one by one, a tensor
// tells Python its shape, strides, dtype and device in half a microsecond, and here in thirty nanoseconds.
#include "signature.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace vlcore {
namespace {

namespace py = pybind11;

// DLPack's layouts (github.com/dmlc/dlpack), of which version 1 may only add to.
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  void *allocate, *take, *give;
  int (*look)(void* tensor, View* view);
  void* current_stream;
};
constexpr uint32_t kMajor = 1;

const Exchange* exchange = nullptr;
std::array<PyTypeObject*, 2> tensor_types{};

bool is_tensor(PyObject* object) {
  return std::find(tensor_types.begin(), tensor_types.end(), Py_TYPE(object)) != tensor_types.end();
}

// What does not fit has no signature: it would be long to compare, too.
class Writer {
 public:
  void bytes(const void* begin, size_t size) {
    if (length_ + size <= buffer_.size()) std::memcpy(buffer_.data() + length_, begin, size);
    length_ += size;
  }
  template <typename T>
  void value(const T& value) {
    bytes(&value, sizeof value);
  }
  py::object written() const {
    if (length_ > buffer_.size()) return py::none();
    return py::bytes(buffer_.data(), length_);
  }

 private:
  std::array<char, 2048> buffer_;
  size_t length_ = 0;
};

uintptr_t begin(const View& view) { return reinterpret_cast<uintptr_t>(view.data) + view.byte_offset; }

// Each says whether what it is given has a signature.
bool write_tensor(PyObject* tensor, Writer& to) {
  View view;
  if (exchange->look(tensor, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool aligned = begin(view) % 16 == 0;
  to.value('T');
  to.value(view.device);
  to.value(view.dtype);
  to.value(view.rank);
  to.value(aligned);
  to.bytes(view.shape, view.rank * sizeof *view.shape);
  to.bytes(view.strides, view.rank * sizeof *view.strides);
  return true;
}

bool write_int(PyObject* number, Writer& to) {
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(number, &overflow);
  to.value('I');
  to.value(value);
  return overflow == 0;
}

bool write_string(PyObject* text, Writer& to) {
  Py_ssize_t size = 0;
  const char* const bytes = PyUnicode_AsUTF8AndSize(text, &size);
  if (bytes == nullptr) {
    PyErr_Clear();
    return false;
  }
  to.value('S');
  to.value(size);
  to.bytes(bytes, size);
  return true;
}

bool write(PyObject* argument, Writer& to) {
  if (is_tensor(argument)) return write_tensor(argument, to);
  if (PyLong_CheckExact(argument)) return write_int(argument, to);
  if (PyUnicode_CheckExact(argument)) return write_string(argument, to);
  if (argument == Py_None) {
    to.value('N');
  } else if (argument == Py_True) {
    to.value('Y');
  } else if (argument == Py_False) {
    to.value('X');
  } else if (PyFloat_CheckExact(argument)) {
    to.value('F');
    to.value(PyFloat_AS_DOUBLE(argument));
  } else {
    return false;
  }
  return true;
}

}  // namespace

void look_at_tensors_by(const py::capsule& given, const py::tuple& types) {
  const auto* table = given.get_pointer<Exchange>();
  while (table != nullptr && table->major != kMajor) table = table->previous;
  if (table == nullptr || table->look == nullptr || types.size() != tensor_types.size()) return;
  // The types are torch's own, which stay; so does the table.
  for (size_t i = 0; i < tensor_types.size(); ++i) {
    tensor_types[i] = reinterpret_cast<PyTypeObject*>(py::object(types[i]).release().ptr());
  }
  exchange = table;
}

py::object signature(const py::args& arguments) {
  if (exchange == nullptr) return py::none();
  Writer writer;
  for (const py::handle argument : arguments) {
    if (!write(argument.ptr(), writer)) return py::none();
  }
  return writer.written();
}

std::optional<uintptr_t> address_of(py::handle argument) {
  if (!is_tensor(argument.ptr())) return std::nullopt;
  View view;
  if (exchange->look(argument.ptr(), &view) != 0) throw py::error_already_set();
  return begin(view);
}

}  // namespace vlcore
