"""Launchers of rotary attention: keys are rotated once for all queries, which are where they are loaded."""

import torch
from torch import Tensor

from . import attention
from .rotary import rotate


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor | None,
    theta: float,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As attention.forward; positions (B, Tk) are those of the keys, and of the queries at their end."""
    k, turns = _rotate_keys(k, positions, theta)
    return attention.forward(q, k, v, cu_seqlens, causal, scale, turns)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    theta: float,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad_q, grad_k, grad_v."""
    k, turns = _rotate_keys(k, positions, theta)
    q_turned = rotate(q, positions[:, k.shape[1] - q.shape[1] :], theta)
    return attention.backward(grad_out, q, k, v, cu_seqlens, out, lse, causal, scale, turns, q_turned)


def _rotate_keys(k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, head_dim = k.shape
    turns = k.new_empty(batch, tokens, head_dim, dtype=torch.float32)
    return rotate(k, positions, theta, turns=turns), turns
