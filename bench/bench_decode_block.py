"""One token through the blocks of the 1.3B, weights as they are, in 8 and in 4 bits, beside operator by operator."""

from functools import partial

import torch

from vlcore import ops
from vlcore.bench.bench_linear import turns
from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.config import LlamaConfig
from vlcore.ops.decode_block import decode_block_reference

LLAMA, KEYS = LlamaConfig(), 640
SIZE, HIDDEN = LLAMA.hidden_size, LLAMA.intermediate_size
SHAPES = [*4 * [(SIZE, SIZE)], *2 * [(HIDDEN, SIZE)], (SIZE, HIDDEN)]
WEIGHTS = sum(outputs * inputs for outputs, inputs in SHAPES)
CACHE = 2 * KEYS * LLAMA.num_kv_heads * LLAMA.head_dim


def _case(bits: int) -> Case:
    def projections(make: Maker) -> list:
        weights = [make(*shape, scale=shape[1] ** -0.5) for shape in SHAPES]
        return [ops.quantize_weight(weight, bits) for weight in weights] if bits else weights

    def inputs(make: Maker) -> Inputs:
        lengths = torch.tensor([KEYS - 1], device=make.device)
        bytes_each = WEIGHTS * bits / 8 if bits else WEIGHTS * make.dtype.itemsize
        return [
            (
                *(make(1, 1, SIZE) for _ in range(2)),
                ops.BlockWeights(make(SIZE), make(SIZE), *projections(make)),
                *(make(1, KEYS, LLAMA.num_kv_heads, LLAMA.head_dim) for _ in range(2)),
                lengths,
            )
            for _ in range(turns(bytes_each))
        ]

    return Case(
        operator="decode_block",
        shape=f"1.3B, {KEYS} keys, {f'{bits} bits' if bits else 'plain weights'}",
        inputs=inputs,
        peers={"operator by operator": partial(decode_block_reference, backend="auto")},
        elements=CACHE + (0 if bits else WEIGHTS),
        bytes=WEIGHTS * bits / 8,
        flops=2 * (WEIGHTS + CACHE),
    )


CASES = [_case(bits) for bits in (0, 8, 4)]
