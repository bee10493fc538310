"""LayerNorm in Triton."""

from torch import Tensor

from . import norm_rows, norm_rows_backward


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (..., N) contiguous -> y (..., N) of x's dtype and, if they are to be kept, mean and rstd (...) float32."""
    y, _, mean, rstd = norm_rows.forward("layer_norm", x, weight, eps, keep, bias=bias)
    return y, mean, rstd


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_y, x (..., N) contiguous, mean and rstd (...) -> grad_x (..., N), grad_weight and grad_bias (N,)."""
    grad_x, grad_weight, grad_bias = norm_rows_backward.backward("layer_norm", grad_y, x, weight, rstd, mean=mean)
    assert grad_bias is not None
    return grad_x, grad_weight, grad_bias
