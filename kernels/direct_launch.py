"""Launching a Triton kernel without what Triton computes anew at each launch.

kernel[grid](...) binds the arguments, looks for what they specialise the kernel to, and asks every knob and hook: some
8 us, as long as a small kernel runs. Here the compiled kernel is kept under all that its choice depends on, and called
as Triton calls it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# What is forgotten is only looked up by Triton again.
MAX_KEPT = 4096
# Of JITFunction.run as Triton has it: what watches launches puts another in its place, and has to be called.
TRITONS_RUN = JITFunction.run if JITFunction.run.__module__ == JITFunction.__module__ else None


class _Kept(NamedTuple):
    """A compiled kernel and how it is called."""

    launcher: Any
    function: int
    packed_metadata: Any
    constants: tuple  # the values of the parameters behind those that are given by position
    alive: tuple  # the code is unloaded with the last that refers to it


_kept: dict[tuple, _Kept] = {}


def run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: tuple,
    settings: Mapping[str, Any],
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
    if type(kernel).run is not TRITONS_RUN or _is_observed(kernel):
        kernel[grid](*tensors, *numbers, enable_fp_fusion=True, **settings)
        return
    dtypes: list[Any] = []
    addresses: list[Any] = []
    together = 0
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
            addresses.append(None)
        else:
            address = tensor.data_ptr()
            together |= address
            dtypes.append(tensor.dtype)
            addresses.append(address)
    active = driver.active
    device = active.get_current_device()
    # Numbers as they are, though Triton asks only for some of their properties; their types tell 1 from 1.0 and True.
    key = id(kernel), device, *dtypes, numbers, *map(type, numbers), *settings.items()
    kept = None if together % 16 else _kept.get(key)
    if kept is None:
        compiled = kernel[grid](*tensors, *numbers, enable_fp_fusion=True, **settings)
        if together % 16 == 0:
            _keep(key, kernel, compiled, len(tensors) + len(numbers), settings)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    launcher, function, packed_metadata, constants, _ = kept
    stream = active.get_current_stream(device)
    launcher(x, y, z, stream, function, packed_metadata, None, None, None, *addresses, *numbers, *constants)


def _is_observed(kernel: Any) -> bool:
    """Whether Triton would do more than launch."""
    runtime = knobs.runtime
    return (
        runtime.debug
        or kernel.pre_run_hooks
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook is not None
        # A chain of hooks, or a function that somebody put in its place.
        or getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
    )


def _keep(key: tuple, kernel: Any, compiled: Any, num_given: int, settings: Mapping[str, Any]) -> None:
    """Of what Triton has just launched, what it takes to launch it again."""
    if compiled is None:  # a hook of Triton's has kept it from being compiled
        return
    constants = tuple(settings[parameter.name] for parameter in kernel.params[num_given:])
    if len(_kept) >= MAX_KEPT:
        _kept.clear()
    _kept[key] = _Kept(compiled.run, compiled.function, compiled.packed_metadata, constants, (kernel, compiled))
