"""RMSNorm in Triton: one program a row, the row held in one block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import num_warps

BACKWARD_PROGRAMS = 256


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, num_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)

    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / num_cols + eps)

    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * num_cols + cols, x * rstd * weight, mask=mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, num_rows, num_cols, BLOCK: tl.constexpr
):
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)

    for row in range(program, num_rows, num_programs):
        x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x_hat = x * rstd
        grad_x_hat = grad_y * weight
        grad_x = (grad_x_hat - x_hat * (tl.sum(grad_x_hat * x_hat, axis=0) / num_cols)) * rstd
        tl.store(grad_x_ptr + row * num_cols + cols, grad_x, mask=mask)
        grad_weight += grad_y * x_hat

    tl.store(partial_ptr + program * num_cols + cols, grad_weight, mask=mask)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., N) contiguous -> y (..., N) of x's dtype, rstd (...) float32."""
    num_cols = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    block = triton.next_power_of_2(num_cols)
    _forward_kernel[(rstd.numel(),)](x, weight, y, rstd, num_cols, eps, BLOCK=block, num_warps=num_warps(block))
    return y, rstd


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """grad_y, x (..., N) contiguous, rstd (...) -> grad_x (..., N), grad_weight (N,)."""
    num_rows, num_cols = rstd.numel(), x.shape[-1]
    num_programs = min(num_rows, BACKWARD_PROGRAMS)
    grad_x = torch.empty_like(x)
    partial = x.new_empty(num_programs, num_cols, dtype=torch.float32)
    block = triton.next_power_of_2(num_cols)
    _backward_kernel[(num_programs,)](
        grad_y, x, weight, rstd, grad_x, partial, num_rows, num_cols, BLOCK=block, num_warps=num_warps(block)
    )
    return grad_x, partial.sum(0).to(weight.dtype)
