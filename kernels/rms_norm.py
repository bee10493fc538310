"""RMSNorm in Triton."""

from torch import Tensor

from . import norm_rows, norm_rows_backward


def forward(x: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor | None]:
    """x (..., N) contiguous -> y (..., N) of x's dtype, and rstd (...) float32 if it is to be kept."""
    y, _, _, rstd = norm_rows.forward("rms_norm", x, weight, eps, keep)
    return y, rstd


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """grad_y, x (..., N) contiguous, rstd (...) -> grad_x (..., N), grad_weight (N,)."""
    grad_x, grad_weight, _ = norm_rows_backward.backward("rms_norm", grad_y, x, weight, rstd)
    return grad_x, grad_weight
