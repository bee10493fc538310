"""LayerNorm: y = (x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.dispatch import (
    AUTO,
    TORCH,
    Kernel,
    apply,
    choose,
    define,
    gradients,
    known,
    once_differentiable,
    remembered,
    statistics,
)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, which every kernel is tested against: torch's own, whose statistics are float32 or wider."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, backend: str = AUTO) -> Tensor:
    """Bring the last dimension of `x` to mean 0 and variance 1, then scale and shift it (arXiv 1607.06450).

    Args:
        x: (..., N), float32, float16 or bfloat16; float64 on "torch". The SAM necks call it channels-last.
        weight, bias: (N,), of x's dtype.
        eps: added to the variance.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (..., N), of x's dtype. Mean and (biased) variance are computed in float32. Under torch.autocast inputs of
        several dtypes are brought to the widest.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(x):
        widest = autocast.widest(x, weight, bias)
        return autocast.run(layer_norm, widest, x, weight, bias, eps, backend=backend)
    backend = _chosen(x, weight, bias, eps, backend)
    if backend == TORCH:
        return layer_norm_reference(x, weight, bias, eps)
    return apply(LayerNorm, x, weight, bias, eps, backend)


@remembered
def _chosen(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> str:
    checks.alike("layer_norm", x=x, weight=weight, bias=bias)
    checks.shape("layer_norm", "weight", weight, x.shape[-1:], "x", x)
    checks.shape("layer_norm", "bias", bias, x.shape[-1:], "x", x)
    checks.rows("layer_norm", "x", x)
    checks.number("layer_norm", "eps", eps)
    return choose("layer_norm", KERNELS, backend, x, weight, bias)


class LayerNorm(torch.autograd.Function):
    """`layer_norm` through its torch ops."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, backend):
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        y, kept = layer_norm_forward(x, weight, bias, eps, any(ctx.needs_input_grad), backend)
        ctx.save_for_backward(x, weight, kept)
        ctx.eps, ctx.backend = eps, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grads = layer_norm_backward(grad_y.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.backend)
        return *grads, None, None


def _triton_refusals(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    return launch.row_refusals(x, weight, bias)


def _cpp_refusals(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    return native.cpp_refusals(x)


def _cpp_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor | None]:
    y = native.fresh(torch.empty_like(x))
    kept = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32) if keep else None
    native.run_cpp("layer_norm_forward", x.dtype, x, weight, bias, y, kept, *native.rows(x), eps)
    return y, kept


def _cpp_backward(grad_y, x, weight, kept, eps):
    grad_x, grads = native.fresh(torch.empty_like(x)), weight.new_empty(2, *weight.shape)
    native.run_cpp("layer_norm_backward", x.dtype, grad_y, x, weight, kept, grad_x, grads, *native.rows(x))
    return grad_x, grads[0], grads[1].clone()


def _cpp_worthwhile(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    # For a row or two, the call is the cost, and torch's own has less of it.
    return known(x.numel() >= 2**14)


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("layer_norm", "forward"),
        native.triton("layer_norm", "backward"),
        _triton_refusals,
        launch.worthwhile,
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals, _cpp_worthwhile),
}


def _torch_forward(x, weight, bias, eps, keep):
    return layer_norm_reference(x, weight, bias, eps), statistics(x, (), TORCH)


def _torch_backward(grad_y, x, weight, kept, eps):
    # No gradient depends on the bias, so anything of its shape stands for it.
    return gradients(lambda *inputs: layer_norm_reference(*inputs, eps), (x, weight, torch.zeros_like(weight)), grad_y)


layer_norm_forward = define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, bool keep, str backend)"
    " -> (Tensor y, Tensor kept)",
    KERNELS,
    _torch_forward,
    fake=lambda x, weight, bias, eps, keep, backend: (
        torch.empty_like(x),
        statistics(x, (*x.shape[:-1], 2), backend, keep),
    ),
)
layer_norm_backward = define(
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor kept, float eps, str backend)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    KERNELS,
    _torch_backward,
    fake=lambda grad_y, x, weight, *rest: (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
)
