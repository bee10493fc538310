"""What a call of an operator costs the host: to check, choose and launch, for one row, where there is little else.

Forward alone, with gradients to be recorded and without, beside torch's own. On a GPU the time until a call is queued.
Without one, the calls that launch Triton's kernels are measured too, with a stand-in for the GPU's driver: all that
Python does for them, but not the driver's own part of a launch.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vlcore import native, ops
from vlcore.bench.command import cases
from vlcore.bench.harness import Maker, Measurement, dtype_name, split
from vlcore.bench.stand_in import Driver, in_place_of_a_gpu
from vlcore.bench.timing import called
from vlcore.kernels import launch
from vlcore.ops.dispatch import AUTO

# Those whose first case is a single row, and whose first peer is torch's own.
OPERATORS = ("rms_norm", "add_rms_norm", "layer_norm", "swiglu")
ATTENTION = ("attention", "rope_attention")
DIRECT, BY_TRITON = "launched directly", "launched by Triton"


def overhead(dtype: torch.dtype, device: str) -> Iterator[Measurement]:
    """A measurement for each operator, with gradients and without."""
    for operator in OPERATORS:
        case = cases(operator)[0]
        peer, others = next(iter(case.peers.items()))
        inputs = _inputs(operator, Maker(dtype, device))
        for records in (False, True):
            functions = {AUTO: _bound(case.on(AUTO), inputs, records), peer: _bound(others, inputs, records)}
            yield _measured(operator, case.shape, records, dtype, device, functions)
    if device == "cpu" and launch.AVAILABLE and not launch.INTERPRETED and native.cpp is not None:
        yield from launched(dtype)


def launched(dtype: torch.dtype, operators: Sequence[str] = (*OPERATORS, *ATTENTION)) -> Iterator[Measurement]:
    """As on a GPU that takes no time to be told to launch; nothing is computed."""
    for operator in operators:
        shape = cases(operator)[0].shape if operator in OPERATORS else "16 tokens, 4 heads of 64"
        inputs = _inputs(operator, Maker(dtype, "cpu"))
        for records in (False, True):
            with in_place_of_a_gpu(Driver(90), "sm_90"):
                direct = _bound(_on_triton(operator), inputs, records)
                functions = {DIRECT: direct, BY_TRITON: _by_triton(direct)}
                title = f"{operator} on Triton without a GPU"
                yield _measured(title, shape, records, dtype, "cpu", functions)


def _inputs(operator: str, make: Maker) -> tuple[Tensor, ...]:
    if operator in OPERATORS:
        inputs = cases(operator)[0].inputs(make)
        assert isinstance(inputs, tuple)
        return inputs
    q, k, v = (make(1, 16, 4, 64) for _ in range(3))
    return (q, k, v) if operator == "attention" else (q, k, v, torch.arange(16)[None])


def _on_triton(operator: str) -> Callable[..., object]:
    function = getattr(ops, operator)
    return lambda *inputs: function(*inputs, backend="triton")


def _bound(function: Callable[..., object], inputs: tuple[Tensor, ...], records: bool) -> Callable[[], object]:
    given = tuple(x.detach().requires_grad_(records) if x.is_floating_point() else x for x in inputs)
    return lambda: function(*given)


def _by_triton(call: Callable[[], object]) -> Callable[[], object]:
    """The same, without what Triton would otherwise not be asked."""
    from vlcore.kernels import direct_launch

    def run() -> None:
        known, direct_launch.TRITONS_RUN = direct_launch.TRITONS_RUN, None
        call()
        direct_launch.TRITONS_RUN = known

    return run


def _measured(
    operator: str,
    shape: str,
    records: bool,
    dtype: torch.dtype,
    device: str,
    functions: dict[str, Callable[[], object]],
) -> Measurement:
    """The first of the functions is ours."""
    seconds, quartiles = split(called(functions, device))
    return Measurement(
        operator=f"call of {operator}",
        shape=f"{shape}, gradients {'recorded' if records else 'not recorded'}",
        dtype=dtype_name(dtype),
        trains=False,
        ours=next(iter(functions)),
        seconds=seconds,
        quartiles=quartiles,
    )
