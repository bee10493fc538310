#pragma once
#include <pybind11/pybind11.h>

namespace vlcore {

// Calls what kernels/direct_launch.py keeps of a launch of this kernel with these arguments, as Triton would call it.
// Returns None where it has; else what to keep a launch by, or () where there is a tensor that does not begin at a
// multiple of 16 bytes, which Triton compiles another kernel for.
pybind11::object launch_again(const pybind11::dict& kept, pybind11::handle kernel, pybind11::handle device,
                              pybind11::handle stream, const pybind11::tuple& grid, const pybind11::tuple& tensors,
                              const pybind11::tuple& numbers, const pybind11::dict& settings);

}  // namespace vlcore
