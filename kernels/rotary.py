"""Rotary positions in Triton: cosines and sines of a position's angles, and heads turned by them.

A head of HEAD_DIM is held as its two halves, each padded to HALF, a power of two: they are the pairs that turn.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch

_QUARTERS = tl.constexpr(2 / math.pi)
_QUARTER = tl.constexpr(math.pi / 2)


@triton.jit
def frequencies(pairs, log2_theta, log2_theta_rest, HEAD_DIM: tl.constexpr):
    """theta^(-2i / D), rounded where the reference rounds: far from the start of a text, the roundings of float32 are
    what models have learnt their angles with."""
    pairs = tl.minimum(pairs, HEAD_DIM // 2 - 1)  # those behind the last are padding, and would be out of range
    exponents = ((2 * pairs).to(tl.float64) / HEAD_DIM).to(tl.float32).to(tl.float64)
    wavelengths = tl.exp2(exponents * log2_theta + exponents * log2_theta_rest).to(tl.float32)
    return (1.0 / wavelengths.to(tl.float64)).to(tl.float32)


@triton.jit
def cosines_and_sines(positions, frequencies):
    """Of positions * frequencies, to 1e-7. An angle is brought to within an eighth of a turn in float64: what libraries
    do for large ones in float32 spills registers."""
    angles = (positions.to(tl.float32) * frequencies).to(tl.float64)
    quarters = tl.floor(angles * _QUARTERS + 0.5)
    r = (angles - quarters * _QUARTER).to(tl.float32)
    square = r * r
    s = r + r * square * (-1.666665487e-1 + square * (8.332173543e-3 + square * -1.951665582e-4))
    c = 4.166664675e-2 + square * (-1.388736145e-3 + square * 2.443773008e-5)
    c = 1.0 - square * 0.5 + square * square * c
    quarter = quarters.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    sines, cosines = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(((quarter + 1) & 2) == 2, -cosines, cosines), tl.where((quarter & 2) == 2, -sines, sines)


@triton.jit
def turn(first, second, cosines, sines):
    """The pairs (first, second), in float32, turned; with sines negated, turned back."""
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def _rotate_kernel(
    x_ptr,
    positions_ptr,
    y_ptr,
    turns_ptr,
    x_batch,
    x_token,
    x_head,
    positions_batch,
    positions_token,
    rows,
    tokens,
    heads,
    log2_theta,
    log2_theta_rest,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DIRECTION: tl.constexpr,
    KEEP_TURNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_M tokens of the batch's rows, BLOCK_H heads of each: their angles are computed once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pairs = tl.arange(0, HALF)
    batch, token = row // tokens, row % tokens
    positions = tl.load(positions_ptr + batch * positions_batch + token * positions_token, mask=row < rows, other=0)
    turning = frequencies(pairs, log2_theta, log2_theta_rest, HEAD_DIM)
    cosines, sines = cosines_and_sines(positions[:, None], turning[None, :])
    if KEEP_TURNS and tl.program_id(1) == 0:
        turns = turns_ptr + row[:, None] * HEAD_DIM + pairs[None, :]
        inside = (row < rows)[:, None] & (pairs < HEAD_DIM // 2)[None, :]
        tl.store(turns, cosines, mask=inside)
        tl.store(turns + HEAD_DIM // 2, sines, mask=inside)
    if DIRECTION < 0:
        sines = -sines

    first_head = tl.program_id(1).to(tl.int64) * BLOCK_H
    x = x_ptr + (batch * x_batch + token * x_token)[:, None] + first_head * x_head + pairs[None, :]
    y = y_ptr + (row[:, None] * heads + first_head) * HEAD_DIM + pairs[None, :]
    for head in tl.static_range(BLOCK_H):
        end = tl.where(first_head + head < heads, rows, 0)
        inside = (row < end)[:, None] & (pairs < HEAD_DIM // 2)[None, :]
        first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + HEAD_DIM // 2, mask=inside, other=0.0).to(tl.float32)
        first, second = turn(first, second, cosines, sines)
        tl.store(y, first, mask=inside)
        tl.store(y + HEAD_DIM // 2, second, mask=inside)
        x += x_head
        y += HEAD_DIM


@cache
def log2_theta(theta: float) -> tuple[float, float]:
    """The base's logarithm as the sum of two floats of 32 bits: Triton takes no wider ones."""
    logarithm = math.log2(theta)
    rounded = torch.tensor(logarithm, dtype=torch.float32).item()
    return rounded, logarithm - rounded


def rotate(x: Tensor, positions: Tensor, theta: float, backwards: bool = False, turns: Tensor | None = None) -> Tensor:
    """x (B, T, H, D) -> the same turned by positions (B, T), contiguous.

    Args:
        backwards: turn back.
        turns: (B, T, D) float32, is filled with each position's cosines, then its sines.
    """
    batch, tokens, heads, head_dim = x.shape
    y = x.new_empty(*x.shape)
    x = x if x.stride(-1) == 1 else x.contiguous()
    if not y.numel():
        return y
    half = max(launch.next_power_of_2(head_dim // 2), 1)
    how = launch.settings("rotary", "rotate", x.device, half=half)
    grid = launch.ceil_div(batch * tokens, how["BLOCK_M"]), launch.ceil_div(heads, how["BLOCK_H"])
    numbers = *x.stride()[:3], *positions.stride(), batch * tokens, tokens, heads, *log2_theta(theta)
    constants = {
        "HEAD_DIM": head_dim,
        "HALF": half,
        "DIRECTION": -1 if backwards else 1,
        "KEEP_TURNS": turns is not None,
    }
    direct_launch.run(_rotate_kernel, grid, (x, positions, y, turns), numbers, constants | how)
    return y


def forward(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    return rotate(x, positions, theta)


def backward(grad_y: Tensor, positions: Tensor, theta: float) -> Tensor:
    return rotate(grad_y, positions, theta, backwards=True)
