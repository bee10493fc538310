"""Rotary causal attention: prompts of the 1.3B, a long one, a packed batch, training, beside rotating and SDPA."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import ops
from vlcore.bench.alternatives import (
    Alternative,
    FlexPacked,
    by_cudnn,
    compiled,
    flex_masked,
    llama_attention,
    varlen_packed,
    xformers_packed,
)
from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.bench.shapes import LLAMA, PROMPT

HEADS, DIM = LLAMA.num_heads, LLAMA.head_dim
BOTH = ("cpu", "cuda")
# Answers of a stage-3 batch, images and text, packed.
PACKED = (PROMPT, 640, 896, 712, 1024, 600, PROMPT, 656)


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
        peers={
            "rotate, SDPA": _rotate_and_sdpa,
            "rotate, SDPA by cuDNN": by_cudnn(_rotate_and_sdpa),
            "transformers": Alternative(llama_attention, "transformers", BOTH),
            "rotate, xformers": Alternative(partial(ops.rope_attention, backend="xformers"), "xformers"),
        },
        flops=2 * HEADS * tokens * (tokens + 1) * DIM * (3.5 if trains else 1),
        trains=trains,
    )


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int, *, backend: str
) -> Tensor:
    return ops.rope_attention(q, k, v, positions, cu_seqlens=cu_seqlens, backend=backend)


def packed(lengths: tuple[int, ...]) -> Callable[[Maker], Inputs]:
    def inputs(make: Maker) -> Inputs:
        q, k, v = (make(1, sum(lengths), HEADS, DIM) for _ in range(3))
        positions = torch.cat([torch.arange(length) for length in lengths]).to(make.device)[None]
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=make.device)
        return q, k, v, positions, cu_seqlens, max(lengths)

    return inputs


def _packed(lengths: tuple[int, ...], trains: bool) -> Case:
    return Case(
        operator="rope_attention",
        shape=f"{len(lengths)} packed, {sum(lengths)} tokens, {HEADS} heads of {DIM}",
        inputs=packed(lengths),
        function=_attend_packed,
        peers={
            "rotate, varlen_attn": Alternative(varlen_packed),
            "rotate, FlexAttention": Alternative(FlexPacked(compiled(flex_masked)), compiles=True),
            "rotate, xformers": Alternative(xformers_packed, "xformers"),
        },
        flops=2 * HEADS * sum(length * (length + 1) for length in lengths) * DIM * (3.5 if trains else 1),
        trains=trains,
    )


CASES = [
    *(_case(tokens) for tokens in (640, PROMPT, 4096)),
    _case(PROMPT, trains=True),
    _packed(PACKED, trains=False),
    _packed(PACKED, trains=True),
]
