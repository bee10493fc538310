"""window_attention in Triton: launchers for maps that windows cover, read and written where the projection has them."""

import torch
from torch import Tensor

from .grid_attention_launch import Grids, Strides, launch_backward, launch_forward


def _grids(qkv: Tensor, window: int) -> Grids:
    batch, height, width, _, heads, head_dim = qkv.shape
    return Grids("window_attention", batch, heads, height, width, window, window, head_dim)


def _strides(qkv: Tensor) -> tuple[Strides, Strides]:
    """Those of (B, H, Y, X) in qkv (B, Y, X, 3, H, D) and in a tensor (B, Y, X, H * D)."""
    _, height, width, _, heads, head_dim = qkv.shape
    token = heads * head_dim
    one = height * width * token, head_dim, width * token, token
    return (3 * one[0], head_dim, 3 * one[2], 3 * one[3]), one


def forward(
    qkv: Tensor, qkv_bias: Tensor | None, rel_pos_h: Tensor, rel_pos_w: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """qkv (B, Y, X, 3, H, D), qkv_bias (3, H, D), both contiguous -> out (B, Y, X, H * D), sums (B, H, Y, X, 2)."""
    batch, height, width, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, height, width, heads * head_dim)
    sums = qkv.new_empty(batch, heads, height, width, 2, dtype=torch.float32)
    fused, one = _strides(qkv)
    tables, strides = (rel_pos_h, rel_pos_w), (fused, fused, one)
    launch_forward(_grids(qkv, window), qkv.unbind(3), qkv_bias, tables, out, sums, strides)
    return out, sums


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    out: Tensor,
    sums: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qkv, qkv_bias (of zeros in its place, where it is None), rel_pos_h and rel_pos_w."""
    grad_bias = torch.zeros(qkv.shape[3:], dtype=qkv.dtype, device=qkv.device)
    if not qkv.numel() or window == 1:
        # The softmax of one key is 1, whatever its score.
        grad_qkv = torch.zeros_like(qkv)
        grad_qkv[..., 2, :, :] = grad_out.view(grad_qkv[..., 2, :, :].shape)
        return grad_qkv, grad_bias, torch.zeros_like(rel_pos_h), torch.zeros_like(rel_pos_w)
    grad_qkv = torch.empty_like(qkv)
    fused, one = _strides(qkv)
    grad_tables = launch_backward(
        _grids(qkv, window),
        grad_out,
        qkv.unbind(3),
        qkv_bias,
        (rel_pos_h, rel_pos_w),
        out,
        sums,
        grad_qkv.unbind(3),
        (one, fused, fused, one),
        fused,
        grad_bias,
    )
    return grad_qkv, grad_bias, *grad_tables
