"""Rotary position embedding the way of LLaMA: the two halves of a head are the pairs that turn."""

from functools import partial

import torch
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import checks
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, apply, choose, define, once_differentiable, remembered


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions (B, T), both (B, T, 1, head_dim / 2): angle i is position * theta^(-2i / D)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    angles = positions[..., None, None].to(dtype) * (1.0 / theta ** (pairs / head_dim))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, H, D) by its angle, in the dtype of the tables; x's dtype back."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def apply_rope_reference(x: Tensor, positions: Tensor, theta: float = 1e4) -> Tensor:
    """The definition, which every kernel is tested against."""
    return rotate(x, *rope_tables(positions, x.shape[-1], theta, torch.promote_types(x.dtype, torch.float32)))


def apply_rope(x: Tensor, positions: Tensor, theta: float = 1e4, *, backend: str = AUTO) -> Tensor:
    """Rotary position embedding the way of LLaMA: the two halves of a head are the pairs (arXiv 2104.09864).

    Args:
        x: (B, T, H, D), floating, D even.
        positions: (B, T), int32 or int64.
        theta: base of the wavelengths.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (B, T, H, D), of x's dtype; computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    backend = _chosen(x, positions, theta, backend)
    if backend == TORCH:
        return apply_rope_reference(x, positions, theta)
    return apply(ApplyRope, x, positions, theta, backend)


@remembered
def _chosen(x: Tensor, positions: Tensor, theta: float, backend: str) -> str:
    checks.rank("apply_rope", "x", x, "B T H D")
    checks.alike("apply_rope", x=x)
    check_positions("apply_rope", positions, "x", x)
    checks.number("apply_rope", "theta", theta)
    return choose("apply_rope", KERNELS, backend, x, positions, theta)


def check_positions(operator: str, positions: Tensor, name: str, x: Tensor) -> None:
    checks.integer(operator, "positions", positions)
    checks.shape(operator, "positions", positions, x.shape[:2], name, x)
    checks.on_device(operator, "positions", positions, name, x)
    if x.shape[-1] % 2:
        raise ValueError(f"{operator}: rotary positions turn pairs; a head of {x.shape[-1]} is odd.")


class ApplyRope(torch.autograd.Function):
    """`apply_rope` through its torch ops; the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx, x, positions, theta, backend):
        ctx.save_for_backward(positions)
        ctx.numbers = (theta, backend)
        return apply_rope_forward(x, positions, theta, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return apply_rope_backward(grad_y, *ctx.saved_tensors, *ctx.numbers), None, None, None


def _cpp_apply_rope(x: Tensor, positions: Tensor, theta: float, backwards: bool = False) -> Tensor:
    y = native.fresh(x.new_empty(x.shape))
    given = (native.strided(x), positions.long().contiguous(), y)
    native.run_cpp("apply_rope", x.dtype, *given, *x.shape, theta, backwards)
    return y


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("rotary", "forward"),
        native.triton("rotary", "backward"),
        lambda x, positions, theta: launch.refusals(x),
        launch.worthwhile,
    ),
    "cpp": Kernel(
        _cpp_apply_rope,
        partial(_cpp_apply_rope, backwards=True),
        lambda x, positions, theta: native.cpp_refusals(x),
    ),
}

apply_rope_forward = define(
    "apply_rope_forward(Tensor x, Tensor positions, float theta, str backend) -> Tensor",
    KERNELS,
    lambda x, positions, theta: apply_rope_reference(x, positions, theta).contiguous(),
    fake=lambda x, *rest: x.new_empty(x.shape),
)
apply_rope_backward = define(
    "apply_rope_backward(Tensor grad_y, Tensor positions, float theta, str backend) -> Tensor",
    KERNELS,
    lambda grad_y, positions, theta: apply_rope_reference(grad_y, -positions, theta).contiguous(),
    fake=lambda grad_y, *rest: grad_y.new_empty(grad_y.shape),
)
