"""rel_pos_attention in Triton: launchers for maps that are one grid."""

import torch
from torch import Tensor

from .grid_attention_launch import Grids, Strides, launch_backward, launch_forward


def _grids(q: Tensor, height: int, width: int) -> Grids:
    batch, heads, _, head_dim = q.shape
    return Grids("rel_pos_attention", batch, heads, height, width, height, width, head_dim)


def _strides(tensor: Tensor, width: int) -> Strides:
    """Those of (B, H, Y, X) in a tensor (B, H, Y * X, D)."""
    batch, head, token, _ = tensor.stride()
    return batch, head, width * token, token


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """With the same strides, as the kernels read them."""
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


def forward(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, Y * X, D) with contiguous rows -> out (B, H, Y * X, D), a token's heads side by side, and sums
    (B, H, Y * X, 2)."""
    batch, heads, tokens, head_dim = q.shape
    k, v = _alike(k, v)
    out = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    sums = q.new_empty(batch, heads, tokens, 2, dtype=torch.float32)
    strides = tuple(_strides(tensor, width) for tensor in (q, k, out))
    launch_forward(_grids(q, height, width), (q, k, v), None, (rel_pos_h, rel_pos_w), out, sums, strides)
    return out, sums


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    out: Tensor,
    sums: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, rel_pos_h and rel_pos_w, contiguous."""
    if not q.numel() or height * width == 1:
        # The softmax of one key is 1, whatever its score.
        zeros = (torch.zeros(tensor.shape, dtype=q.dtype, device=q.device) for tensor in (q, k, rel_pos_h, rel_pos_w))
        grad_q, grad_k, grad_h, grad_w = zeros
        return grad_q, grad_k, grad_out.contiguous().clone(), grad_h, grad_w
    k, v = _alike(k, v)
    grads = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    strides = tuple(_strides(tensor, width) for tensor in (grad_out, q, k, out))
    grids, tables = _grids(q, height, width), (rel_pos_h, rel_pos_w)
    grad_tables = launch_backward(
        grids, grad_out, (q, k, v), None, tables, out, sums, grads, strides, _strides(grads[0], width)
    )
    return *grads, *grad_tables
