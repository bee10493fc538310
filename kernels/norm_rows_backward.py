"""The backward of norm_rows.py, deterministic: each program sums what its rows add to the weight's gradient, and to the
bias's, and one more kernel adds the sums of all programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch


@triton.jit
def _load_gradients(grad_y_ptr, x_ptr, weight, mean, rstd, first, cols, mask):
    """Of a tile: the gradient of y, the normalised x_hat, and its gradient."""
    x = tl.load(x_ptr + first + cols, mask=mask, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + first + cols, mask=mask, other=0.0).to(tl.float32)
    return grad_y, (x - mean[:, None]) * rstd[:, None], grad_y * weight[None, :]


@triton.jit
def _store_grad_x(grad_x_hat, x_hat, across, along, rstd, grad_total_ptr, grad_x_ptr, first, cols, mask):
    """across, along: the means of grad_x_hat and of its product with x_hat, which leave a row's norm as it is."""
    grad_x = (grad_x_hat - across[:, None] - x_hat * along[:, None]) * rstd[:, None]
    if grad_total_ptr is not None:
        grad_x += tl.load(grad_total_ptr + first + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + first + cols, grad_x, mask=mask)


@triton.jit
def _load_statistics(mean_ptr, rstd_ptr, rows, num_rows):
    rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
    mean = tl.zeros_like(rstd)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
    return mean, rstd


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
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of rows that a program holds."""
    cols = tl.arange(0, BLOCK_COLS)
    within = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), PROGRAMS, num_stages=STAGES):
        rows = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mean, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, num_rows)
        first, mask = rows[:, None] * num_cols, (rows < num_rows)[:, None] & within[None, :]
        grad_y, x_hat, grad_x_hat = _load_gradients(grad_y_ptr, x_ptr, weight, mean, rstd, first, cols[None, :], mask)
        along = tl.sum(grad_x_hat * x_hat, axis=1) / num_cols
        across = tl.zeros_like(along)
        if mean_ptr is not None:
            across = tl.sum(grad_x_hat, axis=1) / num_cols
            grad_bias += grad_y
        grad_weight += grad_y * x_hat
        _store_grad_x(grad_x_hat, x_hat, across, along, rstd, grad_total_ptr, grad_x_ptr, first, cols[None, :], mask)

    weight_sums_ptr, bias_sums_ptr = _program_sums(partial_ptr, num_cols)
    tl.store(weight_sums_ptr + cols, tl.sum(grad_weight, axis=0), mask=within)
    if mean_ptr is not None:
        tl.store(bias_sums_ptr + cols, tl.sum(grad_bias, axis=0), mask=within)


@triton.jit
def wide_backward_kernel(
    grad_y_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of rows that a program reads twice. What it sums, it keeps in its rows of partial."""
    weight_sums_ptr, bias_sums_ptr = _program_sums(partial_ptr, num_cols)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), PROGRAMS):
        rows = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        inside, first = (rows < num_rows)[:, None], rows[:, None] * num_cols
        mean, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, num_rows)

        products = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in tl.range(0, num_cols, BLOCK_COLS, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = inside & (cols < num_cols)[None, :]
            weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
            _, x_hat, grad_x_hat = _load_gradients(grad_y_ptr, x_ptr, weight, mean, rstd, first, cols[None, :], mask)
            products += grad_x_hat * x_hat
            if mean_ptr is not None:
                sums += grad_x_hat
        along, across = tl.sum(products, axis=1) / num_cols, tl.sum(sums, axis=1) / num_cols

        # The sums may be read by other threads than those that wrote them for the tile before.
        tl.debug_barrier()
        for start in tl.range(0, num_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            within = cols < num_cols
            mask = inside & within[None, :]
            weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
            grad_y, x_hat, grad_x_hat = _load_gradients(
                grad_y_ptr, x_ptr, weight, mean, rstd, first, cols[None, :], mask
            )
            _store_grad_x(
                grad_x_hat, x_hat, across, along, rstd, grad_total_ptr, grad_x_ptr, first, cols[None, :], mask
            )
            known = within & (tile >= PROGRAMS)
            before = tl.load(weight_sums_ptr + cols, mask=known, other=0.0)
            tl.store(weight_sums_ptr + cols, before + tl.sum(grad_y * x_hat, axis=0), mask=within)
            if mean_ptr is not None:
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
    rstd: Tensor,
    grad_total: Tensor | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad_y, x, grad_total (..., N) contiguous; rstd, mean (...) -> grad_x (..., N), which grad_total is added to;
    grad_weight (N,) and, with a mean, grad_bias (N,)."""
    num_rows, num_cols = rstd.numel(), x.shape[-1]
    settings = launch.settings(operator, "backward", x.device, cols=num_cols, bits=8 * x.element_size())
    num_partials = min(launch.ceil_div(num_rows, settings["BLOCK_ROWS"]), settings["PROGRAMS"])
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = None if mean is None else torch.empty_like(weight)
    kinds = 1 if mean is None else 2
    partial = x.new_empty((kinds, num_partials, num_cols), dtype=torch.float32)
    if num_rows:
        kernel = backward_kernel if settings["BLOCK_COLS"] >= num_cols else wide_backward_kernel
        tensors = grad_y, grad_total, x, weight, mean, rstd, grad_x, partial
        direct_launch.run(kernel, (num_partials,), tensors, (num_rows, num_cols), settings)
    settings = launch.settings(operator, "sum", x.device)
    grid = launch.ceil_div(num_cols, settings["BLOCK_COLS"]), kinds
    direct_launch.run(sum_kernel, grid, (partial, grad_weight, grad_bias), (num_partials, num_cols), settings)
    return grad_x, grad_weight, grad_bias
