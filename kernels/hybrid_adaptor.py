"""The hybrid adaptor in Triton: both towers' projections in one launch, each writing its half of one buffer.

Every launch is a tiled matrix product. What goes into the GELU is kept for the backward, which takes from it the GELU
and its derivative at once, behind the product that gives the gradient of the GELU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch
from .matrix_product import indices, input_precision, operand_bits, product, store_tile, tile_at

# Rows of tiles that are finished together.
GROUP = tl.constexpr(8)


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _project_up_kernel(
    high_ptr,
    low_ptr,
    high_weight_ptr,
    high_bias_ptr,
    low_weight_ptr,
    low_bias_ptr,
    hidden_ptr,
    activated_ptr,
    M,
    high_width,
    low_width,
    high_depth,
    low_depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden (M, Dh + Dl) = [high high_weight^T + high_bias, low low_weight^T + low_bias], activated = GELU(hidden)."""
    high_tiles = tl.cdiv(high_width, BLOCK_N)
    num_col_tiles = high_tiles + tl.cdiv(low_width, BLOCK_N)
    row_tile, col_tile = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_col_tiles, GROUP)
    x_ptr, weight_ptr, bias_ptr, first = high_ptr, high_weight_ptr, high_bias_ptr, 0
    N, K = high_width, high_depth
    if col_tile >= high_tiles:
        x_ptr, weight_ptr, bias_ptr, first = low_ptr, low_weight_ptr, low_bias_ptr, high_width
        N, K = low_width, low_depth
        col_tile -= high_tiles
    rows, cols = indices(row_tile, BLOCK_M), indices(col_tile, BLOCK_N)

    hidden = product(x_ptr, weight_ptr, rows, cols, M, N, K, K, 1, 1, K, BLOCK_K, PRECISION)
    hidden += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]

    store_tile(hidden_ptr + first, hidden, rows, cols, M, N, high_width + low_width)
    store_tile(activated_ptr + first, hidden * _normal_cdf(hidden), rows, cols, M, N, high_width + low_width)


@triton.jit
def _out_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (M, N) = x weight^T + bias."""
    row_tile, col_tile = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows, cols = indices(row_tile, BLOCK_M), indices(col_tile, BLOCK_N)
    out = product(x_ptr, weight_ptr, rows, cols, M, N, K, K, 1, 1, K, BLOCK_K, PRECISION)
    out += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    store_tile(out_ptr, out, rows, cols, M, N, N)


@triton.jit
def _hidden_gradient_kernel(
    grad_out_ptr,
    weight_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    activated_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_hidden (M, N) = (grad_out weight) GELU'(hidden), and activated = GELU(hidden) for the weight's gradient."""
    row_tile, col_tile = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows, cols = indices(row_tile, BLOCK_M), indices(col_tile, BLOCK_N)
    grad = product(grad_out_ptr, weight_ptr, rows, cols, M, N, K, K, 1, N, 1, BLOCK_K, PRECISION)

    # In two halves, one behind the other: of a whole tile, what the derivative takes does not fit the registers.
    halves = tl.split(tl.permute(tl.reshape(grad, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        cols = indices(col_tile * 2 + half, BLOCK_N // 2)
        inside = (rows[:, None] < M) & (cols[None, :] < N)
        hidden = tl.load(hidden_ptr + rows[:, None] * N + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        cdf = _normal_cdf(hidden)
        density = 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
        store_tile(activated_ptr, hidden * cdf, rows, cols, M, N, N)
        store_tile(grad_hidden_ptr, halves[half] * (cdf + hidden * density), rows, cols, M, N, N)


@triton.jit
def _input_gradients_kernel(
    grad_hidden_ptr,
    high_weight_ptr,
    low_weight_ptr,
    grad_high_ptr,
    grad_low_ptr,
    M,
    high_width,
    low_width,
    high_depth,
    low_depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each half of grad_hidden (M, Dh + Dl) times its weight."""
    high_tiles = tl.cdiv(high_depth, BLOCK_N)
    num_col_tiles = high_tiles + tl.cdiv(low_depth, BLOCK_N)
    row_tile, col_tile = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_col_tiles, GROUP)
    weight_ptr, grad_ptr, first, N, K = high_weight_ptr, grad_high_ptr, 0, high_depth, high_width
    if col_tile >= high_tiles:
        weight_ptr, grad_ptr, first, N, K = low_weight_ptr, grad_low_ptr, high_width, low_depth, low_width
        col_tile -= high_tiles
    rows, cols = indices(row_tile, BLOCK_M), indices(col_tile, BLOCK_N)
    stride = high_width + low_width
    grad = product(grad_hidden_ptr + first, weight_ptr, rows, cols, M, N, K, stride, 1, N, 1, BLOCK_K, PRECISION)
    store_tile(grad_ptr, grad, rows, cols, M, N, N)


@triton.jit
def _weight_gradients_kernel(
    grad_out_ptr,
    activated_ptr,
    grad_hidden_ptr,
    high_ptr,
    low_ptr,
    grad_out_weight_ptr,
    grad_high_weight_ptr,
    grad_low_weight_ptr,
    num_rows,
    out_width,
    high_width,
    low_width,
    high_depth,
    low_depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad^T x of the three layers, one behind the other."""
    width = high_width + low_width
    out_tiles = tl.cdiv(out_width, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    high_tiles = tl.cdiv(high_width, BLOCK_M) * tl.cdiv(high_depth, BLOCK_N)
    place = tl.program_id(0)
    grad_ptr, x_ptr, grad_weight_ptr = grad_out_ptr, activated_ptr, grad_out_weight_ptr
    M, N, stride = out_width, width, out_width
    if place >= out_tiles:
        place -= out_tiles
        grad_ptr, x_ptr, grad_weight_ptr = grad_hidden_ptr, high_ptr, grad_high_weight_ptr
        M, N, stride = high_width, high_depth, width
        if place >= high_tiles:
            place -= high_tiles
            grad_ptr, x_ptr, grad_weight_ptr = grad_hidden_ptr + high_width, low_ptr, grad_low_weight_ptr
            M, N = low_width, low_depth
    row_tile, col_tile = tile_at(place, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows, cols = indices(row_tile, BLOCK_M), indices(col_tile, BLOCK_N)
    grad_weight = product(grad_ptr, x_ptr, rows, cols, M, N, num_rows, 1, stride, N, 1, BLOCK_K, PRECISION)
    store_tile(grad_weight_ptr, grad_weight, rows, cols, M, N, N)


def _settings(kernel: str, x: Tensor, num_rows: int) -> dict[str, int]:
    sizes = {"bits": operand_bits(x.dtype, input_precision(x.dtype)), "rows": launch.next_power_of_2(num_rows)}
    return launch.settings("hybrid_adaptor", kernel, x.device, **sizes)


def _tiles(M: int, N: int, settings: dict[str, int]) -> int:
    return launch.ceil_div(M, settings["BLOCK_M"]) * launch.ceil_div(N, settings["BLOCK_N"])


def _run(kernel, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], num_tiles: int, settings: dict[str, int]) -> None:
    direct_launch.run(kernel, (num_tiles,), tensors, sizes, settings | {"PRECISION": input_precision(tensors[0].dtype)})


def forward(
    high: Tensor,
    low: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """high (..., Ch), low (..., Cl) and the layers, all contiguous -> out (..., D), hidden (..., Dh + Dl)."""
    (high_width, high_depth), (low_width, low_depth) = high_weight.shape, low_weight.shape
    out_width, width = out_weight.shape
    out = high.new_empty(*high.shape[:-1], out_width)
    hidden = high.new_empty(*high.shape[:-1], width)
    num_rows = hidden.numel() // width
    if num_rows == 0:
        return out, hidden
    activated = torch.empty_like(hidden)

    settings = _settings("project_up", high, num_rows)
    num_tiles = _tiles(num_rows, high_width, settings) + _tiles(num_rows, low_width, settings)
    layers = (high_weight, high_bias, low_weight, low_bias)
    sizes = (num_rows, high_width, low_width, high_depth, low_depth)
    _run(_project_up_kernel, (high, low, *layers, hidden, activated), sizes, num_tiles, settings)

    settings = _settings("out", high, num_rows)
    num_tiles = _tiles(num_rows, out_width, settings)
    _run(_out_kernel, (activated, out_weight, out_bias, out), (num_rows, out_width, width), num_tiles, settings)
    return out, hidden


def backward(
    grad_out: Tensor,
    high: Tensor,
    low: Tensor,
    high_weight: Tensor,
    low_weight: Tensor,
    out_weight: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of high, low and of the weight and bias of the layers high, low, out; all contiguous."""
    (high_width, high_depth), (low_width, low_depth) = high_weight.shape, low_weight.shape
    out_width, width = out_weight.shape
    num_rows = hidden.numel() // width
    depths = (high_width, low_width, high_depth, low_depth)
    grad_high, grad_low = torch.empty_like(high), torch.empty_like(low)
    grad_hidden, activated = torch.empty_like(hidden), torch.empty_like(hidden)
    if num_rows > 0:
        settings = _settings("hidden_gradient", high, num_rows)
        tensors, sizes = (grad_out, out_weight, hidden, grad_hidden, activated), (num_rows, width, out_width)
        _run(_hidden_gradient_kernel, tensors, sizes, _tiles(num_rows, width, settings), settings)

        settings = _settings("input_gradients", high, num_rows)
        num_tiles = _tiles(num_rows, high_depth, settings) + _tiles(num_rows, low_depth, settings)
        tensors = (grad_hidden, high_weight, low_weight, grad_high, grad_low)
        _run(_input_gradients_kernel, tensors, (num_rows, *depths), num_tiles, settings)

    grad_weights = [torch.empty_like(weight) for weight in (out_weight, high_weight, low_weight)]
    settings = _settings("weight_gradients", high, num_rows)
    num_tiles = sum(_tiles(grad.shape[0], grad.shape[1], settings) for grad in grad_weights)
    given = (grad_out, activated, grad_hidden, high, low, *grad_weights)
    _run(_weight_gradients_kernel, given, (num_rows, out_width, *depths), num_tiles, settings)

    halves = grad_hidden.view(num_rows, width).split((high_width, low_width), 1)
    grad_high_bias, grad_low_bias = (half.sum(0) for half in halves)
    grad_out_bias = grad_out.view(num_rows, out_width).sum(0)
    grad_out_weight, grad_high_weight, grad_low_weight = grad_weights
    layers = ((grad_high_weight, grad_high_bias), (grad_low_weight, grad_low_bias), (grad_out_weight, grad_out_bias))
    return grad_high, grad_low, *(grad for layer in layers for grad in layer)
