"""A residual sum and its RMSNorm: total = x + residual, y = rms_norm(total), in one pass where a kernel can."""

import torch
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, apply, choose, define, gradients, once_differentiable, remembered
from vlcore.ops.rms_norm import rms_norm, rms_norm_reference


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The definition, which every kernel is tested against."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = AUTO
) -> tuple[Tensor, Tensor]:
    """Add a residual and normalise the sum by its root mean square, as between two blocks of a transformer.

    Args:
        x: (..., N), float32, float16 or bfloat16; float64 on "torch".
        residual: (..., N), of x's shape and dtype.
        weight: (N,), of x's dtype.
        eps: added to the mean square.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        rms_norm(x + residual) and x + residual, both (..., N) of x's dtype. What is normalised is the sum as rounded
        to that dtype; the mean square is computed in float32. Under torch.autocast inputs of several dtypes are brought
        to the widest.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(x):
        widest = autocast.widest(x, residual, weight)
        return autocast.run(add_rms_norm, widest, x, residual, weight, eps, backend=backend)
    chosen = _chosen(x, residual, weight, eps, backend)
    if chosen == TORCH:
        total = x + residual
        return rms_norm(total, weight, eps, backend=backend), total
    return apply(AddRMSNorm, x, residual, weight, eps, chosen)


@remembered
def _chosen(x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str) -> str:
    checks.alike("add_rms_norm", x=x, residual=residual, weight=weight)
    checks.shape("add_rms_norm", "residual", residual, x.shape, "x", x)
    checks.shape("add_rms_norm", "weight", weight, x.shape[-1:], "x", x)
    checks.rows("add_rms_norm", "x", x)
    checks.number("add_rms_norm", "eps", eps)
    return choose("add_rms_norm", KERNELS, backend, x, residual, weight)


class AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm` through its torch ops."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, backend):
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        y, total = add_rms_norm_forward(x, residual, weight, eps, backend)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.backend = eps, backend
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_total):
        grad_sum, grad_weight = add_rms_norm_backward(
            grad_y.contiguous(), grad_total.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.backend
        )
        return grad_sum, grad_sum, grad_weight, None, None


def _triton_refusals(x: Tensor, residual: Tensor, weight: Tensor) -> list[str]:
    return launch.row_refusals(x, residual, weight)


def _cpp_refusals(x: Tensor, residual: Tensor, weight: Tensor) -> list[str]:
    return native.cpp_refusals(x)


def _cpp_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = native.fresh(torch.empty_like(x)), native.fresh(torch.empty_like(x))
    native.run_cpp("add_rms_norm_forward", x.dtype, x, residual, weight, y, total, *native.rows(x), eps)
    return y, total


def _cpp_backward(grad_y, grad_total, total, weight, eps):
    grad_sum, grad_weight = native.fresh(torch.empty_like(total)), torch.empty_like(weight)
    given = (grad_y, grad_total, total, weight, grad_sum, grad_weight)
    native.run_cpp("add_rms_norm_backward", total.dtype, *given, *native.rows(total), eps)
    return grad_sum, grad_weight


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("add_rms_norm", "forward"),
        native.triton("add_rms_norm", "backward"),
        _triton_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals),
}


def _torch_backward(grad_y, grad_total, total, weight, eps):
    grad_sum, grad_weight = gradients(lambda x, w: rms_norm_reference(x, w, eps), (total, weight), grad_y)
    return grad_sum + grad_total, grad_weight


add_rms_norm_forward = define(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps, str backend)"
    " -> (Tensor y, Tensor total)",
    KERNELS,
    add_rms_norm_reference,
    fake=lambda x, *rest: (torch.empty_like(x), torch.empty_like(x)),
)
add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor grad_y, Tensor grad_total, Tensor total, Tensor weight, float eps, str backend)"
    " -> (Tensor grad_sum, Tensor grad_weight)",
    KERNELS,
    _torch_backward,
    fake=lambda grad_y, grad_total, total, weight, *rest: (torch.empty_like(total), torch.empty_like(weight)),
)
