"""The hybrid adaptor of the 1.3B on one image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore.bench.harness import Case, Inputs, Maker

TOKENS, TOWER, SIZE = 576, 1024, 2048
FLOPS = 2 * TOKENS * (2 * TOWER * (SIZE // 2) + SIZE**2)


def _inputs(make: Maker) -> Inputs:
    high, low = (make(1, TOKENS, TOWER) for _ in range(2))
    towers = ((make(SIZE // 2, TOWER, scale=TOWER**-0.5), make(SIZE // 2)) for _ in range(2))
    return high, low, *(x for layer in towers for x in layer), make(SIZE, SIZE, scale=SIZE**-0.5), make(SIZE)


def _eager(high: Tensor, low: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
    return F.linear(F.gelu(torch.cat((F.linear(high, w1, b1), F.linear(low, w2, b2)), -1)), w3, b3)


CASES = [
    Case(
        operator="hybrid_adaptor",
        shape=f"{TOKENS} × 2 × {TOWER} → {SIZE}",
        inputs=_inputs,
        peers={"cat, F.gelu": _eager},
        flops=FLOPS * (3 if trains else 1),
        trains=trains,
    )
    for trains in (False, True)
]
