#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <utility>
#include <vector>

namespace vlcore {

// Calls what kernels/direct_launch.py keeps of a launch of this kernel with these arguments, as Triton would call it.
// Returns what is kept, where it has; else the key to keep a launch by, or () where there is a tensor that does not
// begin at a multiple of 16 bytes, which Triton compiles another kernel for.
pybind11::object launch_again(const pybind11::dict& kept, pybind11::handle kernel, pybind11::handle device,
                              pybind11::handle stream, const pybind11::tuple& grid, const pybind11::tuple& tensors,
                              const pybind11::tuple& numbers, const pybind11::dict& settings);

// A launch as Triton calls its launchers, with no metadata of the launch and no hooks; what it is made of is what
// kernels/direct_launch.py keeps.
class Launch {
 public:
  Launch(const pybind11::tuple& kept, const pybind11::tuple& grid, size_t num_tensors, const pybind11::tuple& numbers);

  // The pointers are addresses and None.
  void operator()(pybind11::handle stream, const std::vector<pybind11::object>& pointers) const;

 private:
  pybind11::object launcher_;
  std::vector<pybind11::object> arguments_;  // with room for the stream and, from their place on, the pointers
  size_t stream_, pointers_;
};

// A call that kernels/replay.py has noted. Places count a whole: its arguments, then what it allocates, then None.
class Repetition {
 public:
  // Of each launch: what is kept of a kernel, grid, places with bytes behind their beginning, numbers. What is at one
  // place is given back as it is if it is `alone`, and else as a tuple.
  Repetition(const pybind11::tuple& launches, std::vector<size_t> given_back, bool alone);

  // Allocates and launches. Returns what the call gives back; None, with nothing launched, where a tensor does not
  // begin at a multiple of 16 bytes.
  pybind11::object operator()(pybind11::handle stream, const pybind11::tuple& allocations,
                              const pybind11::args& arguments) const;

 private:
  using Place = std::pair<size_t, size_t>;

  std::vector<std::pair<Launch, std::vector<Place>>> launches_;
  std::vector<size_t> given_back_;
  bool alone_;
};

}  // namespace vlcore
