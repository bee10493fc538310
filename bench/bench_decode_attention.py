"""One token of the 1.3B against its cache."""

import torch

from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.bench.shapes import LLAMA, PROMPT

HEADS, DIM, LAYERS = LLAMA.num_heads, LLAMA.head_dim, LLAMA.num_layers


def _case(length: int) -> Case:
    def inputs(make: Maker) -> Inputs:
        """The caches of every layer, in turn: together they do not fit the processor's."""
        lengths = torch.tensor([length], device=make.device)
        q, k, v = (make(1, 1, HEADS, DIM) for _ in range(3))
        return [(q, k, v, *(make(1, length + 64, HEADS, DIM) for _ in range(2)), lengths) for _ in range(LAYERS)]

    return Case(
        operator="decode_attention",
        shape=f"{HEADS} heads of {DIM}, {length} keys",
        inputs=inputs,
        elements=2 * length * HEADS * DIM,
        flops=4 * length * HEADS * DIM,
    )


CASES = [_case(640), _case(PROMPT)]
