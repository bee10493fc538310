"""RMSNorm of a residual sum in Triton: the sum is written and normalised while it is held."""

from torch import Tensor

from . import norm_rows, norm_rows_backward


def forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (..., N) contiguous -> y, total (..., N) of x's dtype."""
    y, total, _ = norm_rows.forward("add_rms_norm", x, weight, eps, residual=residual)
    assert total is not None
    return y, total


def backward(grad_y: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """grad_y, grad_total, total (..., N) contiguous -> grad_sum (..., N), grad_weight (N,)."""
    grad_sum, grad_weight, _ = norm_rows_backward.backward(
        "add_rms_norm", grad_y, total, weight, eps, grad_total=grad_total
    )
    return grad_sum, grad_weight
