"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, the mean taken over the last dimension."""

import torch
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, apply, choose, define, gradients, once_differentiable, remembered


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, which every kernel is tested against."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    return (x.to(wide) * rstd * weight.to(wide)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = AUTO) -> Tensor:
    """Normalise `x` by its root mean square and scale it by `weight` (arXiv 1910.07467).

    Args:
        x: (..., N), float32, float16 or bfloat16; float64 on "torch".
        weight: (N,), of x's dtype.
        eps: added to the mean square.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (..., N), of x's dtype. The mean square is computed in float32. Under torch.autocast inputs of several dtypes
        are brought to the widest.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(x):
        return autocast.run(rms_norm, autocast.widest(x, weight), x, weight, eps, backend=backend)
    backend = _chosen(x, weight, eps, backend)
    if backend == TORCH:
        return rms_norm_reference(x, weight, eps)
    return apply(RMSNorm, x, weight, eps, backend)


@remembered
def _chosen(x: Tensor, weight: Tensor, eps: float, backend: str) -> str:
    checks.alike("rms_norm", x=x, weight=weight)
    checks.shape("rms_norm", "weight", weight, x.shape[-1:], "x", x)
    checks.rows("rms_norm", "x", x)
    checks.number("rms_norm", "eps", eps)
    return choose("rms_norm", KERNELS, backend, x, weight)


class RMSNorm(torch.autograd.Function):
    """`rms_norm` through its torch ops."""

    @staticmethod
    def forward(ctx, x, weight, eps, backend):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.backend = eps, backend
        return rms_norm_forward(x, weight, eps, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grads = rms_norm_backward(grad_y.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.backend)
        return *grads, None, None


def _triton_refusals(x: Tensor, weight: Tensor) -> list[str]:
    return launch.row_refusals(x, weight)


def _cpp_refusals(x: Tensor, weight: Tensor) -> list[str]:
    return native.cpp_refusals(x)


def _cpp_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = native.fresh(torch.empty_like(x))
    native.run_cpp("rms_norm_forward", x.dtype, x, weight, y, *native.rows(x), eps)
    return y


def _cpp_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = native.fresh(torch.empty_like(x)), torch.empty_like(weight)
    native.run_cpp("rms_norm_backward", x.dtype, grad_y, x, weight, grad_x, grad_weight, *native.rows(x), eps)
    return grad_x, grad_weight


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("rms_norm", "forward"),
        native.triton("rms_norm", "backward"),
        _triton_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals),
}


def _torch_backward(grad_y, x, weight, eps):
    return gradients(lambda x, weight: rms_norm_reference(x, weight, eps), (x, weight), grad_y)


rms_norm_forward = define(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, str backend) -> Tensor y",
    KERNELS,
    rms_norm_reference,
    fake=lambda x, *rest: torch.empty_like(x),
)
rms_norm_backward = define(
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, float eps, str backend)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    KERNELS,
    _torch_backward,
    fake=lambda grad_y, x, weight, *rest: (torch.empty_like(x), torch.empty_like(weight)),
)
