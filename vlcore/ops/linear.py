"""A linear layer: y = x weight^T + bias. For the few rows of a decoding step it is the reading of the weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.ops import checks
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, apply, choose, define, needs_gradient, once_differentiable

# Rows that the C++ kernel takes: with more, torch's matrix product is faster.
MAX_ROWS = 16


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, which every kernel is tested against."""
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = AUTO) -> Tensor:
    """x @ weight^T + bias.

    Args:
        x: (..., K), float32, float16 or bfloat16; float64 on "torch".
        weight: (N, K), of x's dtype.
        bias: (N,), of x's dtype, or None.
        backend: "auto", "torch", or "cpp", which takes up to 16 rows.

    Returns:
        (..., N), of x's dtype. Products are summed in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    checks.alike("linear", x=x, weight=weight, bias=bias)
    checks.rank("linear", "weight", weight, "N K")
    checks.shape("linear", "weight", weight, (weight.shape[0], *x.shape[-1:]), "x", x)
    if bias is not None:
        checks.shape("linear", "bias", bias, weight.shape[:1], "weight", weight)
    backend = choose("linear", KERNELS, backend, x, weight, bias)
    if backend == TORCH:
        return linear_reference(x, weight, bias)
    return apply(LinearFunction, x, weight, bias, backend)


class LinearFunction(torch.autograd.Function):
    """`linear` through its torch op; gradients are matrix products of torch."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, weight)
        return linear_forward(x, weight, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        rows, grad_rows = (tensor.reshape(num_rows(tensor), tensor.shape[-1]) for tensor in (x, grad_y))
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            grad_y @ weight if needs_x else None,
            grad_rows.t() @ rows if needs_weight else None,
            grad_rows.sum(0) if needs_bias else None,
            None,
        )


def num_rows(x: Tensor) -> int:
    """The rows that x (..., K) is as a matrix."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _cpp_refusals(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    too_many = [f"{num_rows(x)} rows are more than {MAX_ROWS}"] * (num_rows(x) > MAX_ROWS)
    return native.cpp_refusals(x) + too_many


def _cpp_worthwhile(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return weight.is_contiguous() and not needs_gradient(x, weight, bias)


def _cpp_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    native.run_cpp("linear_forward", x.dtype, x, weight, bias, y, num_rows(x), *weight.shape)
    return y


# In order of preference; without backwards.
KERNELS = {"cpp": Kernel(_cpp_forward, None, _cpp_refusals, _cpp_worthwhile)}

linear_forward = define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    KERNELS,
    linear_reference,
    fake=lambda x, weight, bias, backend: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
