"""SigLIP-L's attention on one image, and a batch of four, beside SDPA."""

import torch.nn.functional as F
from torch import Tensor

from vlcore.bench.alternatives import Alternative, by_cudnn, xformers_attention
from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.bench.shapes import HYBRID

SIGLIP = HYBRID.siglip

TOKENS, HEADS = SIGLIP.num_tokens, SIGLIP.num_heads
DIM = SIGLIP.hidden_size // HEADS


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _case(batch: int, trains: bool = False) -> Case:
    def inputs(make: Maker) -> Inputs:
        return make(batch, TOKENS, 3, HEADS, DIM).unbind(2)

    return Case(
        operator="attention",
        shape=f"{batch} × {TOKENS} tokens, {HEADS} heads of {DIM}",
        inputs=inputs,
        peers={
            "SDPA": _sdpa,
            "SDPA by cuDNN": by_cudnn(_sdpa),
            "xformers": Alternative(xformers_attention, "xformers"),
        },
        flops=4 * batch * HEADS * TOKENS**2 * DIM * (3.5 if trains else 1),
        trains=trains,
    )


CASES = [_case(1), _case(4), _case(1, trains=True), _case(8, trains=True)]
