"""Bilinear interpolation of detail + alpha * skip, and its adjoint, in Triton: maps channels-last, sums in float32.

Target t of an axis lies at (t + 1/2) SOURCES / TARGETS - 1/2, but not before source 0: an integer over 2 TARGETS, so
its two sources and their weights come from integers, without an error of rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch
from .launch import ceil_div


@triton.jit
def pixel_at(rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Image, y and x of the pixels that are rows of a channels-last map."""
    return rows // (HEIGHT * WIDTH), rows // WIDTH % HEIGHT, rows % WIDTH


@triton.jit
def _sources_of(target, SOURCES: tl.constexpr, TARGETS: tl.constexpr):
    """The two sources that a target lies between, and the weight of the upper one."""
    place = tl.maximum((2 * target + 1) * SOURCES - TARGETS, 0)
    lower = place // (2 * TARGETS)
    weight = (place % (2 * TARGETS)).to(tl.float32) * (0.5 / TARGETS)
    return lower, tl.minimum(lower + 1, SOURCES - 1), weight


@triton.jit
def _weight_of(source, target, SOURCES: tl.constexpr, TARGETS: tl.constexpr):
    """What a target takes of a source; nothing where there is no such target."""
    lower, upper, weight = _sources_of(target, SOURCES, TARGETS)
    taken = tl.where(source == lower, 1.0 - weight, 0.0) + tl.where(source == upper, weight, 0.0)
    return tl.where(target < TARGETS, taken, 0.0)


@triton.jit
def _first_target(source, SOURCES: tl.constexpr, TARGETS: tl.constexpr):
    """The first target that lies less than one source from `source`: of these there are at most 2 TARGETS / SOURCES,
    rounded up."""
    return tl.cdiv(tl.maximum((2 * source - 1) * TARGETS - SOURCES, 0), 2 * SOURCES)


@triton.jit
def _places(pixels, channels, CHANNELS: tl.constexpr):
    return pixels.to(tl.int64)[:, None] * CHANNELS + channels[None, :]


@triton.jit
def _merged(detail_ptr, skip_ptr, alpha, pixels, channels, inside, CHANNELS: tl.constexpr):
    at = _places(pixels, channels, CHANNELS)
    merged = tl.load(detail_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if skip_ptr is not None:
        merged += alpha * tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return merged


@triton.jit
def alpha_of(alpha_ptr):
    return tl.load(alpha_ptr).to(tl.float32) if alpha_ptr is not None else 0.0


@triton.jit
def interpolated(
    detail_ptr,
    skip_ptr,
    alpha,
    image,
    y,
    x,
    channels,
    inside,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Channels of the targets (y, x), (pixels, channels) in float32; 0 where not `inside`, of the same shape."""
    above, below, down = _sources_of(y, HEIGHT, SIZE)
    left, right, along = _sources_of(x, WIDTH, SIZE)
    upper_row, lower_row = (image * HEIGHT + above) * WIDTH, (image * HEIGHT + below) * WIDTH
    down, along = down[:, None], along[:, None]
    upper_left = _merged(detail_ptr, skip_ptr, alpha, upper_row + left, channels, inside, CHANNELS)
    upper_right = _merged(detail_ptr, skip_ptr, alpha, upper_row + right, channels, inside, CHANNELS)
    lower_left = _merged(detail_ptr, skip_ptr, alpha, lower_row + left, channels, inside, CHANNELS)
    lower_right = _merged(detail_ptr, skip_ptr, alpha, lower_row + right, channels, inside, CHANNELS)
    upper = upper_left * (1.0 - along) + upper_right * along
    lower = lower_left * (1.0 - along) + lower_right * along
    return upper * (1.0 - down) + lower * down


@triton.jit
def _resize_kernel(
    detail_ptr,
    skip_ptr,
    alpha_ptr,
    resized_ptr,
    num_pixels,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pixels = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixels[:, None] < num_pixels) & (channels[None, :] < CHANNELS)
    image, y, x = pixel_at(pixels, SIZE, SIZE)
    alpha = alpha_of(alpha_ptr)
    given = interpolated(detail_ptr, skip_ptr, alpha, image, y, x, channels, inside, HEIGHT, WIDTH, CHANNELS, SIZE)
    tl.store(resized_ptr + _places(pixels, channels, CHANNELS), given, mask=inside)


@triton.jit
def _resize_backward_kernel(
    grad_resized_ptr,
    skip_ptr,
    alpha_ptr,
    grad_detail_ptr,
    grad_skip_ptr,
    partial_ptr,
    num_pixels,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Each source gathers from the targets that read it. partial holds each program's part of alpha's gradient."""
    pixels = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixels[:, None] < num_pixels) & (channels[None, :] < CHANNELS)
    image, y, x = pixel_at(pixels, HEIGHT, WIDTH)
    first_y, first_x = _first_target(y, HEIGHT, SIZE), _first_target(x, WIDTH, SIZE)
    grad = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for i in range(tl.cdiv(2 * SIZE, HEIGHT)):
        weight_y = _weight_of(y, first_y + i, HEIGHT, SIZE)
        row = (image * SIZE + first_y + i) * SIZE
        along_row = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
        for j in range(tl.cdiv(2 * SIZE, WIDTH)):
            weight_x = _weight_of(x, first_x + j, WIDTH, SIZE)
            at = _places(row + first_x + j, channels, CHANNELS)
            read = inside & (weight_y * weight_x > 0.0)[:, None]
            given = tl.load(grad_resized_ptr + at, mask=read, other=0.0).to(tl.float32)
            along_row += given * weight_x[:, None]
        grad += along_row * weight_y[:, None]

    at = _places(pixels, channels, CHANNELS)
    tl.store(grad_detail_ptr + at, grad, mask=inside)
    if skip_ptr is not None:
        tl.store(grad_skip_ptr + at, grad * alpha_of(alpha_ptr), mask=inside)
        skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial_ptr + program, tl.sum(tl.sum(grad * skip, axis=1), axis=0))


def resize(detail: Tensor, skip: Tensor | None, alpha: Tensor | None, size: int, settings: dict[str, int]) -> Tensor:
    """detail, skip (B, h, w, C) -> (B, size, size, C)."""
    batch, height, width, channels = detail.shape
    resized = detail.new_empty(batch, size, size, channels)
    num_pixels = batch * size * size
    grid = ceil_div(num_pixels, settings["BLOCK_PIXELS"]), ceil_div(channels, settings["BLOCK_CHANNELS"])
    sizes = (num_pixels, height, width, channels, size)
    if num_pixels > 0:
        direct_launch.run(_resize_kernel, grid, (detail, skip, alpha, resized), sizes, settings)
    return resized


def resize_backward(
    grad_resized: Tensor, skip: Tensor | None, alpha: Tensor | None, height: int, width: int, settings: dict[str, int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad_resized (B, size, size, C) -> the gradients of detail and skip, (B, h, w, C), and of alpha."""
    batch, size, _, channels = grad_resized.shape
    num_pixels = batch * height * width
    grid = ceil_div(num_pixels, settings["BLOCK_PIXELS"]), ceil_div(channels, settings["BLOCK_CHANNELS"])
    sizes = (num_pixels, height, width, channels, size)
    grad_detail = grad_resized.new_empty(batch, height, width, channels)
    grad_skip = partial = None
    if skip is not None:
        grad_skip, partial = torch.empty_like(grad_detail), grad_detail.new_empty(grid, dtype=torch.float32)
    if num_pixels > 0:
        given = (grad_resized, skip, alpha, grad_detail, grad_skip, partial)
        direct_launch.run(_resize_backward_kernel, grid, given, sizes, settings)
    return grad_detail, grad_skip, None if partial is None else partial.sum()
