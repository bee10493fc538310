"""Rotary causal attention: prompts of the 1.3B, a long one, and training, beside rotating and SDPA."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import ops
from vlcore.bench.harness import Case, Inputs, Maker

HEADS, DIM = 16, 128


def _rotate_and_sdpa(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    q, k = (ops.apply_rope(x, positions).transpose(1, 2) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True).transpose(1, 2)


def _case(tokens: int, trains: bool = False) -> Case:
    def inputs(make: Maker) -> Inputs:
        q, k, v = (make(1, tokens, HEADS, DIM) for _ in range(3))
        return q, k, v, torch.arange(tokens, device=make.device)[None]

    return Case(
        operator="rope_attention",
        shape=f"{tokens} tokens, {HEADS} heads of {DIM}",
        inputs=inputs,
        peers={"rotate, SDPA": _rotate_and_sdpa},
        flops=2 * HEADS * tokens * (tokens + 1) * DIM * (3.5 if trains else 1),
        trains=trains,
    )


CASES = [_case(640), _case(1088), _case(4096), _case(1088, trains=True)]
