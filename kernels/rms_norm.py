"""RMSNorm in Triton: a row is held in one block, or where it is too wide for a thread's registers, read twice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


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
def _wide_forward_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, num_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * num_cols + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
        squares += x * x

    rstd = tl.rsqrt(tl.sum(squares, axis=0) / num_cols + eps)

    tl.store(rstd_ptr + row, rstd)
    for start in range(0, num_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < num_cols
        x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * num_cols + cols, x * rstd * weight, mask=mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    num_cols,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)

    for row in range(program, num_rows, PROGRAMS):
        x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x_hat = x * rstd
        grad_x_hat = grad_y * weight
        grad_x = (grad_x_hat - x_hat * (tl.sum(grad_x_hat * x_hat, axis=0) / num_cols)) * rstd
        tl.store(grad_x_ptr + row * num_cols + cols, grad_x, mask=mask)
        grad_weight += grad_y * x_hat

    tl.store(partial_ptr + program * num_cols + cols, grad_weight, mask=mask)


@triton.jit
def _wide_backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    num_cols,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The gradient of the weight is added up in memory, which a program has for itself."""
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, num_rows, PROGRAMS):
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < num_cols
            x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
            grad_y = tl.load(grad_y_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            products += (grad_y * weight) * (x * rstd)
        mean = tl.sum(products, axis=0) / num_cols

        for start in range(0, num_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < num_cols
            x = tl.load(x_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
            grad_y = tl.load(grad_y_ptr + row * num_cols + cols, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            x_hat = x * rstd
            tl.store(grad_x_ptr + row * num_cols + cols, (grad_y * weight - x_hat * mean) * rstd, mask=mask)
            sums_ptr = partial_ptr + program * num_cols + cols
            tl.store(sums_ptr, tl.load(sums_ptr, mask=mask, other=0.0) + grad_y * x_hat, mask=mask)
        # The next row's sums may be read by other threads than wrote them.
        tl.debug_barrier()


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., N) contiguous -> y (..., N) of x's dtype, rstd (...) float32."""
    num_cols = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    settings = _settings("forward", x)
    kernel = _forward_kernel if settings["BLOCK"] >= num_cols else _wide_forward_kernel
    kernel[(rstd.numel(),)](x, weight, y, rstd, num_cols, eps, **settings)
    return y, rstd


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """grad_y, x (..., N) contiguous, rstd (...) -> grad_x (..., N), grad_weight (N,)."""
    num_rows, num_cols = rstd.numel(), x.shape[-1]
    settings = _settings("backward", x)
    num_programs = min(num_rows, settings["PROGRAMS"])
    whole = settings["BLOCK"] >= num_cols
    grad_x = torch.empty_like(x)
    partial = (x.new_empty if whole else x.new_zeros)((num_programs, num_cols), dtype=torch.float32)
    kernel = _backward_kernel if whole else _wide_backward_kernel
    kernel[(num_programs,)](grad_y, x, weight, rstd, grad_x, partial, num_rows, num_cols, **settings)
    return grad_x, partial.sum(0).to(weight.dtype)


def _settings(kernel: str, x: Tensor) -> dict[str, int]:
    """With the block that holds a row, where the table gives none."""
    block = triton.next_power_of_2(x.shape[-1])
    return {"BLOCK": block} | launch.settings("rms_norm", kernel, x.device, block=block)
