"""What a call of an operator costs the host: to check, choose and launch, for one row, where there is little else.

Forward alone, with gradients to be recorded and without, beside torch's own. On a GPU the time until a call is queued.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlcore.bench.command import cases
from vlcore.bench.harness import Maker, Measurement, dtype_name, split
from vlcore.bench.timing import called
from vlcore.ops.dispatch import AUTO

# Those whose first case is a single row, and whose first peer is torch's own.
OPERATORS = ("rms_norm", "add_rms_norm", "layer_norm", "swiglu")


def overhead(dtype: torch.dtype, device: str) -> Iterator[Measurement]:
    """A measurement for each operator, with gradients and without."""
    for operator in OPERATORS:
        case = cases(operator)[0]
        peer, others = next(iter(case.peers.items()))
        inputs = case.inputs(Maker(dtype, device))
        assert isinstance(inputs, tuple)
        for records in (False, True):
            given = tuple(x.requires_grad_(records) for x in inputs)
            functions = {AUTO: _bound(case.on(AUTO), given), peer: _bound(others, given)}
            seconds, quartiles = split(called(functions, device))
            yield Measurement(
                operator=f"call of {operator}",
                shape=f"{case.shape}, gradients {'recorded' if records else 'not recorded'}",
                dtype=dtype_name(dtype),
                trains=False,
                ours=AUTO,
                seconds=seconds,
                quartiles=quartiles,
            )


def _bound(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: function(*inputs)
