"""SAM's global attention at its real size, beside SDPA with a dense bias that stands ready and is not counted."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import ops
from vlcore.bench.alternatives import Alternative, compiled, flex_rel_pos, sdpa_with_bias
from vlcore.bench.harness import Case, Inputs, Maker

SIDE, HEADS, DIM = 64, 12, 64
TOKENS = SIDE * SIDE
# Scores and values; the backward has five such products.
FLOPS = 4 * HEADS * TOKENS**2 * DIM


def _inputs(make: Maker) -> Inputs:
    q, k, v = (make(1, HEADS, TOKENS, DIM) for _ in range(3))
    return q, k, v, *(make(2 * SIDE - 1, DIM, scale=0.1) for _ in range(2))


class _DenseBias:
    """The bias of SDPA, made at the first call."""

    bias: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        if self.bias is None or self.bias.dtype != q.dtype:
            self.bias = torch.randn(1, HEADS, TOKENS, TOKENS, device=q.device).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, self.bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, *, backend: str) -> Tensor:
    return ops.rel_pos_attention(q, k, v, rel_pos_h, rel_pos_w, (SIDE, SIDE), backend=backend)


CASES = [
    Case(
        operator="rel_pos_attention",
        shape=f"{HEADS} × {TOKENS} × {DIM}",
        inputs=_inputs,
        function=_attend,
        peers={
            "SDPA, dense bias": sdpa_with_bias,
            "FlexAttention": Alternative(compiled(flex_rel_pos), compiles=True),
            **({} if trains else {"SDPA, dense bias at hand": _DenseBias()}),
        },
        flops=FLOPS * (3.5 if trains else 1),
        trains=trains,
    )
    for trains in (False, True)
]
