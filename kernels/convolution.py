"""3x3 convolutions of stride 2 and their gradients in Triton: matrix products whose operands are gathered where they
lie (implicit GEMM).

A map x (B, 2 SIDE, 2 SIDE, CHANNELS) becomes y (B, SIDE, SIDE, OUT_CHANNELS), whose pixels are the rows of the product.
Maps are channels-last and weights (OUT_CHANNELS, 3, 3, CHANNELS), so that each step reads runs of channels.
docs/downsample_features.md derives what is done here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch
from .bilinear import alpha_of, interpolated, pixel_at
from .launch import ceil_div
from .matrix_product import indices, input_precision, store_tile, tile_at

# Rows of tiles that are finished together.
GROUP = tl.constexpr(8)


@triton.jit
def _channels_from(start, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A mask of the next BLOCK channels: where BLOCK divides them all, the compiler leaves it out."""
    left = BLOCK if CHANNELS % BLOCK == 0 else CHANNELS - start
    return tl.arange(0, BLOCK) < left


@triton.jit
def _read_by(image, oy, ox, SIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """Where in x the pixel begins that tap (0, 0) of pixel (oy, ox) of y reads: before the map, where that is padding.
    Even sides leave padding only before the first row and column."""
    row = image.to(tl.int64) * (2 * SIDE) + 2 * oy - 1
    return row * (2 * SIDE * CHANNELS) + (2 * ox - 1) * CHANNELS


@triton.jit
def _conv_kernel(
    x_ptr,
    skip_ptr,
    alpha_ptr,
    weight_ptr,
    y_ptr,
    num_rows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[oy, ox] = sum over taps (ty, tx) and channels of x[2 oy - 1 + ty, 2 ox - 1 + tx] weight[ty, tx].

    With INTERPOLATE x is (B, HEIGHT, WIDTH, CHANNELS), and what is multiplied is interpolated as it is loaded."""
    row_tile, col_tile = tile_at(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(OUT_CHANNELS, BLOCK_N), GROUP)
    rows, cols = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), indices(col_tile, BLOCK_N)
    image, oy, ox = pixel_at(rows, SIDE, SIDE)
    channels = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + _read_by(image, oy, ox, SIDE, CHANNELS)[:, None] + channels[None, :]
    weight_ptrs = weight_ptr + cols[None, :] * (9 * CHANNELS) + channels[:, None]
    alpha = alpha_of(alpha_ptr)
    STEPS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(9 * STEPS):
        tap, start = step // STEPS, step % STEPS * BLOCK_K
        ty, tx = tap // 3, tap % 3
        within = _channels_from(start, CHANNELS, BLOCK_K)
        inside = ((rows < num_rows) & (oy + ty > 0) & (ox + tx > 0))[:, None] & within[None, :]
        if INTERPOLATE:
            y, x = 2 * oy - 1 + ty, 2 * ox - 1 + tx
            a = interpolated(
                x_ptr, skip_ptr, alpha, image, y, x, start + channels, inside, HEIGHT, WIDTH, CHANNELS, 2 * SIDE
            ).to(x_ptr.dtype.element_ty)
        else:
            a = tl.load(x_ptrs + ((ty * 2 * SIDE + tx) * CHANNELS + start), mask=inside, other=0.0)
        in_weight = within[:, None] & (cols[None, :] < OUT_CHANNELS)
        b = tl.load(weight_ptrs + (tap * CHANNELS + start), mask=in_weight, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    store_tile(y_ptr, sums, rows.to(tl.int64), cols, num_rows, OUT_CHANNELS, OUT_CHANNELS)


@triton.jit
def _input_gradient_kernel(
    grad_y_ptr,
    weight_ptr,
    grad_x_ptr,
    num_rows,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A pixel of x in an odd row is read by two rows of taps, in an even row by one, and columns alike. So a product is
    done for each of the four parities, of as many taps as it has; those of four taps come first."""
    num_row_tiles, num_col_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(CHANNELS, BLOCK_N)
    parity = 3 - tl.program_id(0) // (num_row_tiles * num_col_tiles)
    place = tl.program_id(0) % (num_row_tiles * num_col_tiles)
    odd_y, odd_x = parity // 2, parity % 2
    row_tile, col_tile = tile_at(place, num_row_tiles, num_col_tiles, GROUP)
    rows, cols = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), indices(col_tile, BLOCK_N)
    image, oy, ox = pixel_at(rows, SIDE, SIDE)
    channels = tl.arange(0, BLOCK_K)
    grad_ptrs = grad_y_ptr + rows.to(tl.int64)[:, None] * OUT_CHANNELS + channels[None, :]
    weight_ptrs = weight_ptr + channels[:, None].to(tl.int64) * (9 * CHANNELS) + cols[None, :]
    STEPS: tl.constexpr = (OUT_CHANNELS + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range((1 + odd_y) * (1 + odd_x) * STEPS):
        tap, start = step // STEPS, step % STEPS * BLOCK_K
        # Pixel 2 oy + odd_y is what tap 1 + odd_y - 2 down of row oy + down reads.
        down, along = tap // (1 + odd_x), tap % (1 + odd_x)
        ty, tx = 1 + odd_y - 2 * down, 1 + odd_x - 2 * along
        within = _channels_from(start, OUT_CHANNELS, BLOCK_K)
        inside = (rows < num_rows) & (oy + down < SIDE) & (ox + along < SIDE)
        grad_at = grad_ptrs + ((down * SIDE + along) * OUT_CHANNELS + start)
        grad = tl.load(grad_at, mask=inside[:, None] & within[None, :], other=0.0)
        weight_at = weight_ptrs + (tl.cast(start, tl.int64) * 9 + ty * 3 + tx) * CHANNELS
        weight = tl.load(weight_at, mask=within[:, None] & (cols[None, :] < CHANNELS), other=0.0)
        sums = tl.dot(grad, weight, sums, input_precision=PRECISION)
    # Tap (1, 1) reads the pixel in an even row and column.
    at = _read_by(image, oy, ox, SIDE, CHANNELS) + ((1 + odd_y) * 2 * SIDE + 1 + odd_x) * CHANNELS
    inside = (rows < num_rows)[:, None] & (cols[None, :] < CHANNELS)
    tl.store(grad_x_ptr + at[:, None] + cols[None, :], sums, mask=inside)


@triton.jit
def _weight_gradient_kernel(
    grad_y_ptr,
    x_ptr,
    grad_weight_ptr,
    num_rows,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_weight[tap] = grad_y^T x[tap], the sum over pixels cut into SPLITS parts, each written by itself."""
    CHANNEL_TILES: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    row_tile, col_tile = tile_at(tl.program_id(0), tl.cdiv(OUT_CHANNELS, BLOCK_M), 9 * CHANNEL_TILES, GROUP)
    tap = col_tile // CHANNEL_TILES
    ty, tx = tap // 3, tap % 3
    rows, cols = indices(row_tile, BLOCK_M), indices(col_tile % CHANNEL_TILES, BLOCK_N)
    split, chunk = tl.program_id(1), tl.cdiv(tl.cdiv(num_rows, SPLITS), BLOCK_K) * BLOCK_K
    last = tl.minimum((split + 1) * chunk, num_rows)
    grad_ptrs, x_ptrs = grad_y_ptr + rows[:, None], x_ptr + ((ty * 2 * SIDE + tx) * CHANNELS + cols[None, :])
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * chunk, last, BLOCK_K):
        pixels = start + tl.arange(0, BLOCK_K)
        in_grad = (rows[:, None] < OUT_CHANNELS) & (pixels < last)[None, :]
        grad = tl.load(grad_ptrs + pixels.to(tl.int64)[None, :] * OUT_CHANNELS, mask=in_grad, other=0.0)
        image, oy, ox = pixel_at(pixels, SIDE, SIDE)
        inside = ((pixels < last) & (oy + ty > 0) & (ox + tx > 0))[:, None] & (cols[None, :] < CHANNELS)
        x = tl.load(x_ptrs + _read_by(image, oy, ox, SIDE, CHANNELS)[:, None], mask=inside, other=0.0)
        sums = tl.dot(grad, x, sums, input_precision=PRECISION)
    grad_weight_ptr += split.to(tl.int64) * (OUT_CHANNELS * 9 * CHANNELS) + tap * CHANNELS
    store_tile(grad_weight_ptr, sums, rows, cols, OUT_CHANNELS, CHANNELS, 9 * CHANNELS)


def conv(
    x: Tensor, skip: Tensor | None, alpha: Tensor | None, weight: Tensor, side: int, settings: dict[str, int]
) -> Tensor:
    """x (B, h, w, C), with skip as in _conv_kernel, and weight (N, 3, 3, C) -> (B, side, side, N)."""
    batch, height, width, channels = x.shape
    y = x.new_empty(batch, side, side, weight.shape[0])
    num_rows = batch * side * side
    grid = (ceil_div(num_rows, settings["BLOCK_M"]) * ceil_div(weight.shape[0], settings["BLOCK_N"]),)
    sizes = (num_rows, height, width, side, channels, weight.shape[0])
    if num_rows > 0:
        constants = settings | {"PRECISION": input_precision(x.dtype)}
        direct_launch.run(_conv_kernel, grid, (x, skip, alpha, weight, y), sizes, constants)
    return y


def input_gradient(grad_y: Tensor, weight: Tensor, settings: dict[str, int]) -> Tensor:
    """grad_y (B, SIDE, SIDE, N), weight (N, 3, 3, C) -> (B, 2 SIDE, 2 SIDE, C)."""
    batch, side, _, out_channels = grad_y.shape
    channels, num_rows = weight.shape[3], batch * side * side
    grad_x = grad_y.new_empty(batch, 2 * side, 2 * side, channels)
    grid = (4 * ceil_div(num_rows, settings["BLOCK_M"]) * ceil_div(channels, settings["BLOCK_N"]),)
    sizes = (num_rows, side, channels, out_channels)
    if num_rows > 0:
        constants = settings | {"PRECISION": input_precision(grad_y.dtype)}
        direct_launch.run(_input_gradient_kernel, grid, (grad_y, weight, grad_x), sizes, constants)
    return grad_x


def weight_gradient(grad_y: Tensor, x: Tensor, settings: dict[str, int]) -> Tensor:
    """grad_y (B, SIDE, SIDE, N), x (B, 2 SIDE, 2 SIDE, C) -> (N, 3, 3, C)."""
    batch, side, _, out_channels = grad_y.shape
    channels, splits = x.shape[3], settings["SPLITS"]
    parts = x.new_empty(splits, out_channels, 3, 3, channels, dtype=x.dtype if splits == 1 else torch.float32)
    num_tiles = ceil_div(out_channels, settings["BLOCK_M"]) * 9 * ceil_div(channels, settings["BLOCK_N"])
    sizes = (batch * side * side, side, channels, out_channels)
    constants = settings | {"PRECISION": input_precision(x.dtype)}
    direct_launch.run(_weight_gradient_kernel, (num_tiles, splits), (grad_y, x, parts), sizes, constants)
    return parts[0] if splits == 1 else parts.sum(0).to(x.dtype)
