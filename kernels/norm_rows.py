"""Norms over rows, forward: the device code of rms_norm, add_rms_norm and layer_norm.

A program holds a tile of whole rows, and of rows that are too long for that one chunk of columns after the other. With
a residual, the rows are those of the sum; with a bias, they are centred, as LayerNorm has them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch


@triton.jit
def _load_rows(x_ptr, residual_ptr, total_ptr, first, cols, mask):
    """A tile of x in float32, or of the total, which is written as it is rounded."""
    x = tl.load(x_ptr + first + cols, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + first + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + first + cols, x, mask=mask)
    return x.to(tl.float32)


@triton.jit
def _with_chunk(mean, squares, x, mask, start, num_cols, BLOCK_COLS: tl.constexpr, CENTRED: tl.constexpr):
    """The mean and the sum of squared deviations of each row up to column `start`, and then with the chunk x."""
    if CENTRED:
        count = tl.minimum(num_cols - start, BLOCK_COLS).to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / count
        deviation = tl.where(mask, x - chunk_mean[:, None], 0.0)
        apart, share = chunk_mean - mean, count / (start + count)
        mean += apart * share
        squares += tl.sum(deviation * deviation, axis=1) + apart * apart * (start * share)
    else:
        squares += tl.sum(x * x, axis=1)
    return mean, squares


@triton.jit
def _load_scale(weight_ptr, bias_ptr, cols, num_cols):
    """The weight and, where there is one, the bias."""
    weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
    bias = tl.zeros_like(weight)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
    return weight, bias


@triton.jit
def _reciprocal_deviation(mean, squares, statistics_ptr, rows, num_rows, num_cols, eps):
    """What a row's deviations are multiplied by, which is kept beside the mean where that is asked for."""
    rstd = tl.rsqrt(squares / num_cols + eps)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + 2 * rows, mean, mask=rows < num_rows)
        tl.store(statistics_ptr + 2 * rows + 1, rstd, mask=rows < num_rows)
    return rstd


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    statistics_ptr,
    num_rows,
    num_cols,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Of rows that a program holds."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    first, mask = rows[:, None] * num_cols, (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    zeros = tl.zeros((BLOCK_ROWS,), tl.float32)
    # Asked for ahead of the sums over rows, which all threads wait for.
    weight, bias = _load_scale(weight_ptr, bias_ptr, cols, num_cols)
    x = _load_rows(x_ptr, residual_ptr, total_ptr, first, cols[None, :], mask)
    mean, squares = _with_chunk(zeros, zeros, x, mask, 0, num_cols, BLOCK_COLS, bias_ptr is not None)
    rstd = _reciprocal_deviation(mean, squares, statistics_ptr, rows, num_rows, num_cols, eps)
    tl.store(y_ptr + first + cols[None, :], (x - mean[:, None]) * rstd[:, None] * weight + bias, mask=mask)


@triton.jit
def wide_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    statistics_ptr,
    num_rows,
    num_cols,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Of rows that a program reads twice."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside, first = (rows < num_rows)[:, None], rows[:, None] * num_cols
    mean, squares = tl.zeros((BLOCK_ROWS,), tl.float32), tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = inside & (cols < num_cols)[None, :]
        x = _load_rows(x_ptr, residual_ptr, total_ptr, first, cols[None, :], mask)
        mean, squares = _with_chunk(mean, squares, x, mask, start, num_cols, BLOCK_COLS, bias_ptr is not None)
    rstd = _reciprocal_deviation(mean, squares, statistics_ptr, rows, num_rows, num_cols, eps)

    if residual_ptr is not None:
        # Of the total, other threads may read what one has written.
        tl.debug_barrier()
        x_ptr = total_ptr
    for start in range(0, num_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = inside & (cols < num_cols)[None, :]
        x = tl.load(x_ptr + first + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        weight, bias = _load_scale(weight_ptr, bias_ptr, cols, num_cols)
        tl.store(y_ptr + first + cols[None, :], (x - mean[:, None]) * rstd[:, None] * weight + bias, mask=mask)


def forward(
    operator: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, residual (..., N) contiguous -> y and, with a residual, the total (..., N) of x's dtype; if they are to be
    kept, the rows' statistics (..., 2) float32: mean, and 1 / standard deviation."""
    num_cols = x.shape[-1]
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    statistics = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32) if keep else None
    num_rows = x.numel() // num_cols
    settings = launch.settings(operator, "forward", x.device, cols=num_cols, bits=8 * x.element_size())
    if num_rows:
        kernel = forward_kernel if settings["BLOCK_COLS"] >= num_cols else wide_forward_kernel
        tensors = x, residual, weight, bias, y, total, statistics
        grid = (launch.ceil_div(num_rows, settings["BLOCK_ROWS"]),)
        direct_launch.run(kernel, grid, tensors, (num_rows, num_cols, eps), settings)
    return y, total, statistics
