"""SwiGLU in Triton: y = gate * sigmoid(gate) * up, and both gradients, which compute the sigmoid again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch


@triton.jit
def _place(num_cols, BLOCK: tl.constexpr):
    """A program's row, and its columns of that."""
    num_blocks = tl.cdiv(num_cols, BLOCK)
    row, block = (tl.program_id(0) // num_blocks).to(tl.int64), (tl.program_id(0) % num_blocks).to(tl.int64)
    return row, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, num_cols, BLOCK: tl.constexpr):
    row, cols = _place(num_cols, BLOCK)
    mask = cols < num_cols
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_cols + cols, gate * _sigmoid(gate) * up, mask=mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    gate_stride,
    up_stride,
    num_cols,
    BLOCK: tl.constexpr,
):
    row, cols = _place(num_cols, BLOCK)
    mask, at = cols < num_cols, row * num_cols + cols
    grad_y = tl.load(grad_y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    # silu' = sigmoid + gate * sigmoid * (1 - sigmoid)
    tl.store(grad_gate_ptr + at, grad_y * up * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)
    tl.store(grad_up_ptr + at, grad_y * silu, mask=mask)


def _as_rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int, tuple[int, int, int]]:
    """Both with dense rows: of halves of one product, the rows; of what is contiguous, one long row. Then the number of
    rows, and what a kernel wants to know: the strides of both, and the columns."""
    if gate.is_contiguous() and up.is_contiguous():
        size = gate.numel()
        return gate, up, 1, (size, size, size)
    gate, up = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate, up))
    gate, up = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (gate, up))
    return gate, up, gate.shape[0], (gate.stride(0), up.stride(0), gate.shape[1])


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (...) of any strides -> y (...), contiguous."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up, num_rows, sizes = _as_rows(gate, up)
    settings = launch.settings("swiglu", "forward", gate.device, bits=8 * gate.element_size())
    programs = num_rows * launch.ceil_div(sizes[2], settings["BLOCK"])
    if programs:
        direct_launch.run(_forward_kernel, (programs,), (gate, up, y), sizes, settings)
    return y


def backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """grad_y (...) contiguous, gate and up (...) of any strides -> their gradients (...), contiguous."""
    grad_gate, grad_up = torch.empty_like(grad_y), torch.empty_like(grad_y)
    gate, up, num_rows, sizes = _as_rows(gate, up)
    settings = launch.settings("swiglu", "backward", gate.device, bits=8 * gate.element_size())
    programs = num_rows * launch.ceil_div(sizes[2], settings["BLOCK"])
    if programs:
        direct_launch.run(_backward_kernel, (programs,), (grad_y, gate, up, grad_gate, grad_up), sizes, settings)
    return grad_gate, grad_up
