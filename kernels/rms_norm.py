"""RMSNorm in Triton."""

from torch import Tensor

from . import norm_rows, norm_rows_backward


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., N) contiguous -> y (..., N) of x's dtype."""
    return norm_rows.forward("rms_norm", x, weight, eps)[0]


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """grad_y, x (..., N) contiguous -> grad_x (..., N), grad_weight (N,)."""
    grad_x, grad_weight, _ = norm_rows_backward.backward("rms_norm", grad_y, x, weight, eps)
    return grad_x, grad_weight
