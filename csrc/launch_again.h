#pragma once
#include <pybind11/pybind11.h>

namespace vlcore {

// Calls what kernels/direct_launch.py keeps of a launch of this kernel with these arguments, as Triton would call it.
// Returns what is kept, where it has; else the key to keep a launch by, or () where there is a tensor that does not
// begin at a multiple of 16 bytes, which Triton compiles another kernel for.
pybind11::object launch_again(const pybind11::dict& kept, pybind11::handle kernel, pybind11::handle device,
                              pybind11::handle stream, const pybind11::tuple& grid, const pybind11::tuple& tensors,
                              const pybind11::tuple& numbers, const pybind11::dict& settings);

// Makes the launches of a call that kernels/replay.py has noted, on the tensors among these arguments, and says whether
// it has: none of them is made where a tensor does not begin at a multiple of 16 bytes.
bool launch_all(const pybind11::tuple& launches, pybind11::handle stream, const pybind11::tuple& arguments);

}  // namespace vlcore
