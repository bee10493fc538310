#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

namespace vlcore {

// From now on tensors are looked at by torch's table of C functions for DLPack (`__dlpack_c_exchange_api__`), a stable
// interface that needs no torch to build; it holds for these types, and not for types derived from them.
void look_at_tensors_by(const pybind11::capsule& exchange, const pybind11::tuple& types);

// Bytes that are equal for arguments that look alike. Of tensors: device, dtype, shape, strides, and whether they begin
// at a multiple of 16 bytes; of bools, ints, floats and strings: type and value. None where there is anything else, or
// a tensor that has no memory of its own.
pybind11::object signature(const pybind11::args& arguments);

// Where a tensor of those types begins; nothing for anything else.
std::optional<uintptr_t> address_of(pybind11::handle argument);

}  // namespace vlcore
