"""Linear layers of the 1.3B in 8 and 4 bits, for a decoded token and a prompt, beside F.linear with the weight not
quantised."""

import torch.nn.functional as F
from torch import Tensor

from vlcore import ops
from vlcore.bench.bench_linear import turns
from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.bench.shapes import PROMPT


def _case(outputs: int, inputs: int, bits: int, group_size: int | None, rows: int = 1) -> Case:
    size = outputs * inputs
    scales = 4 * outputs * (1 if group_size is None else inputs // group_size)
    bytes_each = size * bits / 8 + scales

    def make_inputs(make: Maker) -> Inputs:
        weights = [make(outputs, inputs) for _ in range(turns(size * make.dtype.itemsize))]
        quantized = [ops.quantize_weight(weight, bits, group_size) for weight in weights]
        x = make(rows, inputs)
        count = turns(bytes_each)
        return [(x, quantized[i % len(weights)], weights[i % len(weights)]) for i in range(count)]

    def multiply(x: Tensor, quantized: ops.QuantizedWeight, weight: Tensor, *, backend: str) -> Tensor:
        return ops.quantized_linear(x, quantized, backend=backend)

    scale = "a scale a row" if group_size is None else f"groups of {group_size}"
    return Case(
        operator="quantized_linear",
        shape=f"{rows} × {inputs} → {outputs}, {bits} bits, {scale}",
        inputs=make_inputs,
        function=multiply,
        peers={"F.linear, not quantised": lambda x, quantized, weight: F.linear(x, weight)},
        elements=rows * (inputs + outputs) if rows > 1 else 0,
        bytes=bytes_each,
        computes=rows > 1,
        flops=2 * rows * size,
    )


CASES = [
    *(
        _case(outputs, inputs, bits, group_size)
        for outputs, inputs in ((5632, 2048), (102400, 2048))
        for bits, group_size in ((8, None), (4, None), (4, 128), (4, 32))
    ),
    *(_case(5632, 2048, bits, group_size, rows=PROMPT) for bits, group_size in ((8, None), (4, 128))),
]
