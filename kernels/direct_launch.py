"""Launching a Triton kernel without what Triton computes anew at each launch.

kernel[grid](...) binds the arguments, looks for what they specialise the kernel to, and asks every knob and hook: some
8 us, as long as a small kernel runs. Here the compiled kernel is kept under all that its choice depends on, and called
as Triton calls it: csrc/launch_again.cpp finds it and calls it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vlcore.native import cpp

# What is forgotten is only looked up by Triton again.
MAX_KEPT = 4096
# Of JITFunction.run as Triton has it: what watches launches puts another in its place, and has to be called.
TRITONS_RUN = JITFunction.run if JITFunction.run.__module__ == JITFunction.__module__ else None


class _Kept(NamedTuple):
    """A compiled kernel and how it is called, in the order that csrc/launch_again.cpp knows."""

    launcher: Any
    function: int
    packed_metadata: Any
    constants: tuple  # the values of the parameters behind those that are given by position
    alive: tuple  # the code is unloaded with the last that refers to it


class Launch(NamedTuple):
    """A launch that was made; `kept` is None where only Triton can make it."""

    kept: _Kept | None
    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    numbers: tuple


_kept: dict[tuple, _Kept] = {}
_thread = local()


def _nothing_is_kept(*launch: Any) -> tuple[()]:
    return ()


# Without the C++ extension, Triton launches all.
_launch_again = cpp.launch_again if cpp else _nothing_is_kept


def run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple,
    settings: dict[str, Any],
) -> None:
    """kernel[grid](*tensors, *numbers, **settings) for a @triton.jit kernel, on the current device and stream.

    The same is launched as by Triton, with products and sums fused where they meet (enable_fp_fusion), which the
    kernels count on. Triton launches by itself the first time, and whenever it would do more than launch: in its
    interpreter, for tensors that do not begin at a multiple of 16 bytes, and where hooks or debugging are switched on.

    Args:
        grid: one to three numbers of programs.
        tensors: on the current device, which is only looked at the first time.
        numbers: ints, floats and bools, and tuples of ints.
        settings: the kernel's other parameters, all constexpr, and num_warps and num_stages.
    """
    launches = getattr(_thread, "launches", None)
    if launches is None:
        _run(kernel, grid, tensors, numbers, settings)
        return
    # What Triton asks of tensors is no business of who notes.
    with torch._C.DisableTorchFunction():
        made = _run(kernel, grid, tensors, numbers, settings)
    launches.append(Launch(made, kernel, grid, tensors, numbers))


def _run(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple, settings: dict[str, Any]
) -> _Kept | None:
    if type(kernel).run is not TRITONS_RUN or kernel.pre_run_hooks or is_observed():
        kernel[grid](*tensors, *numbers, enable_fp_fusion=True, **settings)
        return None
    active = driver.active
    device = active.get_current_device()
    stream = active.get_current_stream(device)
    found = _launch_again(_kept, kernel, device, stream, grid, tensors, numbers, settings)
    if isinstance(found, _Kept):
        return found
    compiled = kernel[grid](*tensors, *numbers, enable_fp_fusion=True, **settings)
    return _keep(found, kernel, compiled, len(tensors) + len(numbers), settings) if found else None


def is_observed() -> bool:
    """Whether Triton would do more than launch, of any kernel."""
    runtime = knobs.runtime
    return (
        JITFunction.run is not TRITONS_RUN
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook is not None
        # A chain of hooks, or a function that somebody put in its place.
        or getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
    )


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """All that this thread launches by `run` in it; it is not to be nested."""
    _thread.launches = []
    try:
        yield _thread.launches
    finally:
        _thread.launches = None


def _keep(key: tuple, kernel: Any, compiled: Any, num_given: int, settings: Mapping[str, Any]) -> _Kept | None:
    """Of what Triton has just launched, what it takes to launch it again."""
    if compiled is None:  # a hook of Triton's has kept it from being compiled
        return None
    constants = tuple(settings[parameter.name] for parameter in kernel.params[num_given:])
    if len(_kept) >= MAX_KEPT:
        _kept.clear()
    kept = _Kept(compiled.run, compiled.function, compiled.packed_metadata, constants, (kernel, compiled))
    _kept[key] = kept
    return kept
