"""A linear layer: y = activation(x weight^T + bias) + residual.

For the few rows of a decoding step it is the reading of the weight; for many it is arithmetic, and what follows the
product is done while its sums are at hand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.ops import autocast, checks, products
from vlcore.ops.dispatch import (
    AUTO,
    TORCH,
    Kernel,
    apply,
    choose,
    define,
    known,
    needs_gradient,
    once_differentiable,
    remembered,
)

# Rows up to which a kernel is a reading of the weight.
MAX_ROWS = 16
# What a layer of many rows has to cost, in multiplications, before its gradients are worth an autograd function in
# Python.
_BLOCKED_WORK = 1 << 22


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The definition, which every kernel is tested against."""
    return _behind(F.linear(x, weight, bias), residual, activation)


def _behind(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    y = y if activation is None else F.gelu(y)
    return y if residual is None else y + residual


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str = AUTO,
) -> Tensor:
    """activation(x @ weight^T + bias) + residual.

    Args:
        x: (..., K), float32, float16 or bfloat16; float64 on "torch".
        weight: (N, K), of x's dtype.
        bias: (N,), of x's dtype, or None.
        residual: (..., N), of x's dtype, or None.
        activation: "gelu", with the exact erf, or None.
        backend: "auto", "torch" or "cpp".

    Returns:
        (..., N), of x's dtype. Products are summed in float32. Under torch.autocast x, weight and bias are cast to its
        dtype, and the residual is added in the wider of the two.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, another activation, or a backend that cannot run them.
    """
    if autocast.is_on(x):
        y = autocast.run(linear, autocast.low(x), x, weight, bias, activation=activation, backend=backend)
        if residual is not None:
            checks.shape("linear", "residual", residual, y.shape, "the product", y)
        return y if residual is None else y + residual
    arguments = (x, weight, bias, residual, activation)
    records = needs_gradient(x, weight, bias, residual)
    backend = _chosen(*arguments, backend, records)
    if backend == TORCH:
        return linear_reference(*arguments)
    if records:
        # What goes into the activation is kept for its gradient.
        return _behind(apply(LinearFunction, x, weight, bias, backend), residual, activation)
    tensors = (None if tensor is None else tensor.contiguous() for tensor in arguments[:4])
    return linear_forward(*tensors, activation, backend)


@remembered
def _chosen(x, weight, bias, residual, activation, backend, records) -> str:
    checks.alike("linear", x=x, weight=weight, bias=bias, residual=residual)
    checks.rank("linear", "weight", weight, "N K")
    checks.shape("linear", "weight", weight, (weight.shape[0], *x.shape[-1:]), "x", x)
    if bias is not None:
        checks.shape("linear", "bias", bias, weight.shape[:1], "weight", weight)
    if residual is not None:
        checks.shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]), "x", x)
    if activation not in (None, "gelu"):
        raise ValueError(f"linear: activation {activation!r} is neither 'gelu' nor None.")
    return choose("linear", KERNELS, backend, x, weight, bias, residual, activation)


class LinearFunction(torch.autograd.Function):
    """`linear` without what follows the product, through its torch ops."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return linear_forward(x, weight, bias, None, None, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x, grad_weight = linear_backward(grad_y.contiguous(), x, weight, needs_x, needs_weight, ctx.backend)
        return (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad_y.reshape(num_rows(grad_y), grad_y.shape[-1]).sum(0) if needs_bias else None,
            None,
        )


def num_rows(x: Tensor) -> int:
    """The rows that x (..., K) is as a matrix."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _cpp_refusals(x, weight, bias, residual=None, activation=None) -> list[str]:
    return native.cpp_refusals(x)


def _cpp_worthwhile(x, weight, bias, residual=None, activation=None) -> bool:
    recorded = needs_gradient(x, weight, bias, residual)
    if known(num_rows(x) <= MAX_ROWS):
        return weight.is_contiguous() and not recorded
    # The products of the gradients are as deep as the outputs are many, and the rows.
    depth = max(weight.shape) if recorded else weight.shape[1]
    if not products.ours_are_faster(x.dtype, num_rows(x), weight.shape[0], depth):
        return False
    return not recorded or known(num_rows(x) * weight.shape[0] * weight.shape[1] >= _BLOCKED_WORK)


def _cpp_forward(x: Tensor, weight: Tensor, bias, residual, activation) -> Tensor:
    y = native.fresh(x.new_empty(*x.shape[:-1], weight.shape[0]))
    sizes = (num_rows(x), *weight.shape)
    if sizes[0] <= MAX_ROWS:
        native.run_cpp("linear_forward", x.dtype, x, weight, bias, y, *sizes)
        return y if residual is None and activation is None else _behind(y, residual, activation)
    given = (x, weight, bias, residual, y)
    native.run_cpp("linear_blocked_forward", x.dtype, *given, *sizes, weight.shape[0], activation == "gelu")
    return y


def _cpp_backward(grad_y: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool):
    grad_x, grad_weight = map(native.fresh, _empty_gradients(x, weight, needs_x, needs_weight))
    sizes = (num_rows(x), *weight.shape)
    if needs_x:
        native.run_cpp("linear_grad_x", x.dtype, grad_y, weight, grad_x, *sizes)
    if needs_weight:
        native.run_cpp("linear_grad_weight", x.dtype, grad_y, x, grad_weight, *sizes)
    return grad_x, grad_weight


def _empty_gradients(x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


# In order of preference.
KERNELS = {"cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals, _cpp_worthwhile)}


def _torch_backward(grad_y: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool):
    rows, grad_rows = (tensor.reshape(num_rows(tensor), tensor.shape[-1]) for tensor in (x, grad_y))
    return (
        grad_y @ weight if needs_x else x.new_empty(0),
        grad_rows.t() @ rows if needs_weight else weight.new_empty(0),
    )


linear_forward = define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation, str backend) -> Tensor",
    KERNELS,
    linear_reference,
    fake=lambda x, weight, *rest: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
# A gradient that is not needed is empty.
linear_backward = define(
    "linear_backward(Tensor grad_y, Tensor x, Tensor weight, bool needs_x, bool needs_weight, str backend)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    KERNELS,
    _torch_backward,
    fake=lambda grad_y, x, weight, needs_x, needs_weight, backend: _empty_gradients(x, weight, needs_x, needs_weight),
)
