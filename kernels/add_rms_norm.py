"""RMSNorm of a residual sum in Triton: the sum is written and normalised while it is held."""

from torch import Tensor

from . import norm_rows, norm_rows_backward


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, residual (..., N) contiguous -> y, total (..., N) of x's dtype, and rstd (...) float32 if it is to be kept."""
    y, total, _, rstd = norm_rows.forward("add_rms_norm", x, weight, eps, keep, residual=residual)
    assert total is not None
    return y, total, rstd


def backward(
    grad_y: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """grad_y, grad_total, total (..., N) contiguous, rstd (...) -> grad_sum (..., N), grad_weight (N,)."""
    grad_sum, grad_weight, _ = norm_rows_backward.backward(
        "add_rms_norm", grad_y, total, weight, rstd, grad_total=grad_total
    )
    return grad_sum, grad_weight
