"""Launchers of sequence attention, with rotary turns or without: scores are computed again in the backward."""

import math
from functools import cache

import torch
from torch import Tensor

from . import direct_launch, launch
from .matrix_product import input_precision, operand_bits
from .sequence_attention import forward_kernel
from .sequence_attention_backward import keys_kernel, queries_kernel

# From this many elements from token to token, offsets within a block would not fit in 32 bits.
MAX_TOKEN_STRIDE = 1 << 24


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float,
    turns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, Tq, Hq, D), k, v (B, Tk, Hkv, D) -> out (B, Tq, Hq, D), logs of the denominators (B, Hq, Tq) float32.

    Args:
        cu_seqlens: (num_sequences + 1,) int32, on q's device.
        turns: (B, Tk, D) float32, cosines and sines of the keys' positions: k is rotated by them, and q is yet to be.
    """
    batch, tokens, heads, _ = q.shape
    out, lse = q.new_empty(*q.shape), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if not out.numel():
        return out, lse
    (q, q_strides), (k, k_strides), (v, v_strides) = _readable(q), _readable(k), _readable(v)
    constants, factor, sizes = _compiled_for(q, cu_seqlens, causal, scale, turns)
    how = launch.settings("sequence_attention", "forward", q.device, **sizes, rows=_rows(q))
    grid = batch * heads, launch.ceil_div(tokens, how["BLOCK_M"])
    numbers = (*q_strides, *k_strides, *v_strides, *_sizes(q, k, cu_seqlens), heads, heads // k.shape[2], factor)
    direct_launch.run(forward_kernel, grid, (q, k, v, turns, cu_seqlens, out, lse), numbers, constants | how)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    turns: Tensor | None = None,
    q_turned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad_q, grad_k, grad_v; `q_turned` is q rotated, where there are turns."""
    grad_q, grad_k, grad_v = (x.new_empty(*x.shape) for x in (q, k, v))
    delta, grad_out = torch.empty_like(lse), grad_out.contiguous()
    (q, q_strides), (k, k_strides), (v, v_strides) = _readable(q), _readable(k), _readable(v)
    constants, factor, sizes = _compiled_for(q, cu_seqlens, causal, scale, turns)
    tokens, (heads, kv_heads) = _sizes(q, k, cu_seqlens), (q.shape[2], k.shape[2])
    if grad_q.numel():
        how = launch.settings("sequence_attention", "queries", q.device, **sizes, rows=_rows(q))
        grid = q.shape[0] * heads, launch.ceil_div(q.shape[1], how["BLOCK_M"])
        tensors = q, k, v, turns, cu_seqlens, out, grad_out, lse, delta, grad_q
        numbers = (*q_strides, *k_strides, *v_strides, *tokens, heads, heads // kv_heads, factor, scale)
        direct_launch.run(queries_kernel, grid, tensors, numbers, constants | how)
    if grad_k.numel():
        if q_turned is not None:
            q, q_strides = _readable(q_turned)
        how = launch.settings("sequence_attention", "keys", q.device, **sizes, rows=_rows(k))
        grid = k.shape[0] * kv_heads, launch.ceil_div(k.shape[1], how["BLOCK_N"])
        tensors = q, k, v, turns, cu_seqlens, grad_out, lse, delta, grad_k, grad_v
        numbers = (*q_strides, *k_strides, *v_strides, *tokens, kv_heads, heads // kv_heads, factor, scale)
        direct_launch.run(keys_kernel, grid, tensors, numbers, constants | how | {"GROUPED": heads != kv_heads})
    return grad_q, grad_k, grad_v


def _readable(x: Tensor) -> tuple[Tensor, list[int]]:
    """x (B, T, H, D) as the kernels read it, and its strides but for the last, which is 1."""
    *strides, last = x.stride()
    if last != 1 or strides[1] >= MAX_TOKEN_STRIDE:
        x = x.contiguous()
        *strides, _ = x.stride()
    return x, strides


def _sizes(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Queries, keys and sequences."""
    return q.shape[1], k.shape[1], 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _rows(x: Tensor) -> int:
    """About how many rows of all heads there are for programs to share: large blocks of few would leave some idle."""
    return launch.next_power_of_2(x.shape[0] * x.shape[1] * x.shape[2])


def _compiled_for(
    q: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float, turns: Tensor | None
) -> tuple[dict, float, dict]:
    precision = input_precision(q.dtype)
    return _constants(q.dtype, precision, q.shape[3], cu_seqlens is not None, causal, scale, turns is not None)


@cache
def _constants(
    dtype: torch.dtype,
    precision: str,
    head_dim: int,
    packed: bool,
    causal: bool,
    scale: float,
    rotary: bool,
) -> tuple[dict, float, dict]:
    """What a kernel is compiled for, the factor of the scores, and what its launch depends on. Not to be changed.

    The factor is the scale in float32. Elsewhere it is positive, as maxima are sought before it, with log2(e) for
    exp2, and SIGN is that of the scale.
    """
    wide = dtype == torch.float32
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(launch.next_power_of_2(head_dim), 16),
        "CAUSAL": causal,
        "PACKED": packed,
        "ROTARY": rotary,
        "SIGN": 1 if wide else (scale > 0) - (scale < 0),
        "PRECISION": precision,
    }
    sizes = {"bits": operand_bits(dtype, precision), "head_dim": constants["BLOCK_D"]}
    return constants, scale if wide else abs(scale) * math.log2(math.e) or 1.0, sizes
