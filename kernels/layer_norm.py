"""LayerNorm in Triton."""

from torch import Tensor

from . import norm_rows, norm_rows_backward


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor | None]:
    """x (..., N) contiguous -> y (..., N) of x's dtype and, if they are to be kept, the rows' statistics (..., 2)
    float32: mean, and 1 / standard deviation."""
    y, _, statistics = norm_rows.forward("layer_norm", x, weight, eps, bias=bias, keep=keep)
    return y, statistics


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_y, x (..., N) contiguous, statistics (..., 2) -> grad_x (..., N), grad_weight and grad_bias (N,)."""
    given = (grad_y, x, weight, eps)
    grad_x, grad_weight, grad_bias = norm_rows_backward.backward("layer_norm", *given, statistics=statistics)
    assert grad_bias is not None
    return grad_x, grad_weight, grad_bias
