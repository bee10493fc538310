"""The backward of norm_rows.py, deterministic: each program sums what its rows add to the weight's gradient, and to the
bias's, and one more kernel adds the sums of all programs.

A LayerNorm's forward has kept its rows' statistics. The norm of a row that is not centred costs nothing to compute
again, as the row is read for a sum anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch


@triton.jit
def _load_rows(grad_y_ptr, x_ptr, weight, mean, first, cols, mask):
    """Of a tile: the gradient of y, the deviations of x from the mean, and the gradient of what they are scaled to."""
    x = tl.load(x_ptr + first + cols, mask=mask, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + first + cols, mask=mask, other=0.0).to(tl.float32)
    return grad_y, x - mean[:, None], grad_y * weight[None, :]


@triton.jit
def _store_grad_x(grad_x_hat, x_hat, across, along, rstd, grad_total_ptr, grad_x_ptr, first, cols, mask):
    """across, along: the means of grad_x_hat and of its product with x_hat, which leave a row's norm as it is."""
    grad_x = (grad_x_hat - across[:, None] - x_hat * along[:, None]) * rstd[:, None]
    if grad_total_ptr is not None:
        grad_x += tl.load(grad_total_ptr + first + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + first + cols, grad_x, mask=mask)


@triton.jit
def _load_statistics(statistics_ptr, rows, num_rows, BLOCK_ROWS: tl.constexpr):
    mean, rstd = tl.zeros((BLOCK_ROWS,), tl.float32), tl.zeros((BLOCK_ROWS,), tl.float32)
    if statistics_ptr is not None:
        mean = tl.load(statistics_ptr + 2 * rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(statistics_ptr + 2 * rows + 1, mask=rows < num_rows, other=0.0)
    return mean, rstd


@triton.jit
def _summand(grad_x_hat, deviations, CENTRED: tl.constexpr):
    """What is summed over a row besides the products of gradients and deviations."""
    return grad_x_hat if CENTRED else deviations * deviations


@triton.jit
def _projections(products, sums, rstd, rows, num_rows, num_cols, eps, CENTRED: tl.constexpr):
    """From a row's sums: the means of grad_x_hat and of its product with x_hat, and rstd, given if there is a mean."""
    across = tl.zeros_like(sums)
    if CENTRED:
        across = sums / num_cols
    else:
        # Behind the last row there are zeros, which eps may not keep from being infinitely far from 1.
        rstd = tl.where(rows < num_rows, tl.rsqrt(sums / num_cols + eps), 0.0)
    return across, products * rstd / num_cols, rstd


@triton.jit
def _program_sums(partial_ptr, num_cols):
    """Where a program's row of partial is for the weight's gradient, and of those behind for the bias's."""
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    return partial_ptr + program * num_cols, partial_ptr + (num_programs + program) * num_cols


@triton.jit
def backward_kernel(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    num_cols,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of rows that a program holds."""
    CENTRED: tl.constexpr = statistics_ptr is not None
    cols = tl.arange(0, BLOCK_COLS)
    within = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), PROGRAMS, num_stages=STAGES):
        rows = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mean, rstd = _load_statistics(statistics_ptr, rows, num_rows, BLOCK_ROWS)
        first, mask = rows[:, None] * num_cols, (rows < num_rows)[:, None] & within[None, :]
        grad_y, deviations, grad_x_hat = _load_rows(grad_y_ptr, x_ptr, weight, mean, first, cols[None, :], mask)
        products = tl.sum(grad_x_hat * deviations, axis=1)
        sums = tl.sum(_summand(grad_x_hat, deviations, CENTRED), axis=1)
        across, along, rstd = _projections(products, sums, rstd, rows, num_rows, num_cols, eps, CENTRED)
        x_hat = deviations * rstd[:, None]
        grad_weight += grad_y * x_hat
        if CENTRED:
            grad_bias += grad_y
        _store_grad_x(grad_x_hat, x_hat, across, along, rstd, grad_total_ptr, grad_x_ptr, first, cols[None, :], mask)

    weight_sums_ptr, bias_sums_ptr = _program_sums(partial_ptr, num_cols)
    tl.store(weight_sums_ptr + cols, tl.sum(grad_weight, axis=0), mask=within)
    if CENTRED:
        tl.store(bias_sums_ptr + cols, tl.sum(grad_bias, axis=0), mask=within)


@triton.jit
def wide_backward_kernel(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    num_cols,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of rows that a program reads twice. What it sums, it keeps in its rows of partial."""
    CENTRED: tl.constexpr = statistics_ptr is not None
    weight_sums_ptr, bias_sums_ptr = _program_sums(partial_ptr, num_cols)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), PROGRAMS):
        rows = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        inside, first = (rows < num_rows)[:, None], rows[:, None] * num_cols
        mean, rstd = _load_statistics(statistics_ptr, rows, num_rows, BLOCK_ROWS)

        products = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in tl.range(0, num_cols, BLOCK_COLS, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = inside & (cols < num_cols)[None, :]
            weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
            _, deviations, grad_x_hat = _load_rows(grad_y_ptr, x_ptr, weight, mean, first, cols[None, :], mask)
            products += grad_x_hat * deviations
            sums += _summand(grad_x_hat, deviations, CENTRED)
        products, sums = tl.sum(products, axis=1), tl.sum(sums, axis=1)
        across, along, rstd = _projections(products, sums, rstd, rows, num_rows, num_cols, eps, CENTRED)

        # The sums may be read by other threads than those that wrote them for the tile before.
        tl.debug_barrier()
        for start in tl.range(0, num_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            within = cols < num_cols
            mask = inside & within[None, :]
            weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
            grad_y, deviations, grad_x_hat = _load_rows(grad_y_ptr, x_ptr, weight, mean, first, cols[None, :], mask)
            x_hat = deviations * rstd[:, None]
            _store_grad_x(
                grad_x_hat, x_hat, across, along, rstd, grad_total_ptr, grad_x_ptr, first, cols[None, :], mask
            )
            known = within & (tile >= PROGRAMS)
            before = tl.load(weight_sums_ptr + cols, mask=known, other=0.0)
            tl.store(weight_sums_ptr + cols, before + tl.sum(grad_y * x_hat, axis=0), mask=within)
            if CENTRED:
                before = tl.load(bias_sums_ptr + cols, mask=known, other=0.0)
                tl.store(bias_sums_ptr + cols, before + tl.sum(grad_y, axis=0), mask=within)


@triton.jit
def sum_kernel(
    partial_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    num_partials,
    num_cols,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The gradients of the weight and, where there is one, of the bias: always in the same order."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    sums = tl.zeros((BLOCK_PARTIALS, BLOCK_COLS), tl.float32)
    for start in range(0, num_partials, BLOCK_PARTIALS):
        partials = start + tl.arange(0, BLOCK_PARTIALS)
        rows = tl.program_id(1).to(tl.int64) * num_partials + partials
        mask = (partials < num_partials)[:, None] & (cols < num_cols)[None, :]
        sums += tl.load(partial_ptr + rows[:, None] * num_cols + cols[None, :], mask=mask, other=0.0)
    grad = tl.sum(sums, axis=0)
    if tl.program_id(1) == 0:
        tl.store(grad_weight_ptr + cols, grad, mask=cols < num_cols)
    elif grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + cols, grad, mask=cols < num_cols)


def backward(
    operator: str,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_total: Tensor | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad_y, x, grad_total (..., N) contiguous, statistics (..., 2) those of a LayerNorm -> grad_x (..., N), which
    grad_total is added to; grad_weight (N,) and, of a LayerNorm, grad_bias (N,)."""
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols
    settings = launch.settings(operator, "backward", x.device, cols=num_cols, bits=8 * x.element_size())
    num_partials = min(launch.ceil_div(num_rows, settings["BLOCK_ROWS"]), settings["PROGRAMS"])
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = None if statistics is None else torch.empty_like(weight)
    kinds = 1 if statistics is None else 2
    partial = x.new_empty((kinds, num_partials, num_cols), dtype=torch.float32)
    if num_rows:
        kernel = backward_kernel if settings["BLOCK_COLS"] >= num_cols else wide_backward_kernel
        tensors = grad_y, grad_total, x, weight, statistics, grad_x, partial
        direct_launch.run(kernel, (num_partials,), tensors, (num_rows, num_cols, eps), settings)
    settings = launch.settings(operator, "sum", x.device)
    grid = launch.ceil_div(num_cols, settings["BLOCK_COLS"]), kinds
    direct_launch.run(sum_kernel, grid, (partial, grad_weight, grad_bias), (num_partials, num_cols), settings)
    return grad_x, grad_weight, grad_bias
