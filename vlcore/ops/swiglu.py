"""SwiGLU: y = silu(gate) * up, elementwise, with silu(g) = g * sigmoid(g)."""

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
)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, which every kernel is tested against."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor, *, backend: str = AUTO) -> Tensor:
    """The gate of LLaMA's MLP: silu(gate) * up (arXiv 2002.05202).

    Args:
        gate: (...), float32, float16 or bfloat16; float64 on "torch".
        up: of gate's shape and dtype.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        Of gate's shape and dtype. Under torch.autocast inputs of two dtypes are brought to the wider.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(gate):
        return autocast.run(swiglu, autocast.widest(gate, up), gate, up, backend=backend)
    backend = _chosen(gate, up, backend)
    if backend == TORCH:
        return swiglu_reference(gate, up)
    return apply(SwiGLU, gate, up, backend)


@remembered
def _chosen(gate: Tensor, up: Tensor, backend: str) -> str:
    checks.alike("swiglu", gate=gate, up=up)
    checks.shape("swiglu", "up", up, gate.shape, "gate", gate)
    return choose("swiglu", KERNELS, backend, gate, up)


class SwiGLU(torch.autograd.Function):
    """`swiglu` through its torch ops. The backward computes silu(gate) again instead of keeping it."""

    @staticmethod
    def forward(ctx, gate, up, backend):
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return swiglu_forward(gate, up, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grads = swiglu_backward(grad_y.contiguous(), *ctx.saved_tensors, ctx.backend)
        return *grads, None


def _triton_refusals(gate: Tensor, up: Tensor) -> list[str]:
    return launch.refusals(gate, up)


def _cpp_refusals(gate: Tensor, up: Tensor) -> list[str]:
    return native.cpp_refusals(gate)


def _cpp_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = native.fresh(torch.empty_like(gate))
    native.run_cpp("swiglu_forward", gate.dtype, gate, up, y, y.numel())
    return y


def _cpp_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    grad_gate, grad_up = native.fresh(torch.empty_like(gate)), native.fresh(torch.empty_like(up))
    native.run_cpp("swiglu_backward", gate.dtype, grad_y, gate, up, grad_gate, grad_up, gate.numel())
    return grad_gate, grad_up


def _cpp_worthwhile(gate: Tensor, up: Tensor) -> bool:
    # For a row or two, the call is the cost, and torch's own has less of it.
    return known(gate.numel() >= 2**14)


# In order of preference.
KERNELS = {
    "triton": Kernel(
        native.triton("swiglu", "forward"), native.triton("swiglu", "backward"), _triton_refusals, launch.worthwhile
    ),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals, _cpp_worthwhile),
}


def _torch_forward(gate, up):
    return swiglu_reference(gate, up).contiguous()


swiglu_forward = define(
    "swiglu_forward(Tensor gate, Tensor up, str backend) -> Tensor",
    KERNELS,
    _torch_forward,
    fake=lambda gate, up, backend: gate.new_empty(gate.shape),
)
swiglu_backward = define(
    "swiglu_backward(Tensor grad_y, Tensor gate, Tensor up, str backend) -> (Tensor grad_gate, Tensor grad_up)",
    KERNELS,
    lambda grad_y, gate, up: gradients(swiglu_reference, (gate, up), grad_y),
    fake=lambda grad_y, gate, up, backend: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
