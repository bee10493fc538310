"""Launchers of attention over grids, for any tensors that say where their heads, image rows and columns stand.

Strides are those of (batch, head, y, x) on the map; the last dimension, head_dim, is contiguous.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import direct_launch
from .grid_attention import forward_kernel
from .grid_attention_backward import backward_queries_kernel
from .grid_attention_sums import backward_keys_kernel, backward_tables_kernel, sum_parts_kernel
from .launch import ceil_div, next_power_of_2, settings
from .matrix_product import input_precision, operand_bits

# Up to this many keys, such as a window's, delta is corrected in every dtype.
FEW_KEYS = 512
# Parts that the sums of the tables' gradients are cut into: what fills a GPU.
TABLE_SPLITS = 64
SUM_BLOCK = 64

Strides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Grids:
    """The grids (height, width) that cover a batch of maps from the top left."""

    operator: str
    batch: int
    heads: int
    map_height: int
    map_width: int
    height: int
    width: int
    head_dim: int

    @property
    def padded(self) -> bool:
        return self.map_height % self.height > 0 or self.map_width % self.width > 0

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def units(self) -> int:
        """Heads of grids."""
        down, across = ceil_div(self.map_height, self.height), ceil_div(self.map_width, self.width)
        return self.batch * down * across * self.heads

    @property
    def on_map(self) -> tuple[int, int, int]:
        return self.heads, self.map_height, self.map_width


@cache
def _constants(grids: Grids, kernel: str, device: torch.device, dtype: torch.dtype, precision: str) -> dict:
    """A kernel's constants, warps and stages, less those that it does not have."""
    block_d = max(next_power_of_2(grids.head_dim), 16)
    sizes = {"bits": operand_bits(dtype, precision), "head_dim": block_d, "tokens": next_power_of_2(grids.tokens)}
    entry = dict(settings(grids.operator, kernel, device, **sizes))
    if kernel == "backward_tables":
        entry["BLOCK_X"] = settings(grids.operator, "backward_queries", device, **sizes)["BLOCK_X"]
    else:
        entry["SCALE"] = grids.head_dim**-0.5
    entry["BLOCK_X"] = min(max(next_power_of_2(grids.width), 16), entry["BLOCK_X"])
    if kernel in ("backward_queries", "backward_keys"):
        entry["CORRECTED"] = dtype == torch.float32 or grids.tokens <= FEW_KEYS
    shape = {"HEIGHT": grids.height, "WIDTH": grids.width, "HEAD_DIM": grids.head_dim, "PADDED": grids.padded}
    return shape | {"PRECISION": precision, "BLOCK_D": block_d} | entry


def _constants_of(grids: Grids, kernel: str, tensor: Tensor) -> dict:
    return _constants(grids, kernel, tensor.device, tensor.dtype, input_precision(tensor.dtype))


def launch_forward(
    grids: Grids,
    inputs: tuple[Tensor, ...],
    padding: Tensor | None,
    tables: tuple[Tensor, Tensor],
    out: Tensor,
    sums: Tensor,
    strides: tuple[Strides, ...],
) -> None:
    """Fills out, and sums (batch, heads, map_height, map_width, 2) with each softmax's maximum and sum.

    Args:
        inputs: q, k and v; strides are those of q, of k and v, and of out.
        padding: (3, heads, head_dim), the q, k and v of every place off the map; None: zeros.
        tables: (2 * height - 1, head_dim) and (2 * width - 1, head_dim).
    """
    if not grids.units:
        return
    constants = _constants_of(grids, "forward", out)
    rel_h = out.new_empty(grids.units, grids.height, grids.tokens, dtype=torch.float32)
    programs = grids.units * ceil_div(grids.tokens, constants["BLOCK_M"])
    tensors = *inputs, padding, *tables, out, sums, rel_h
    direct_launch.run(forward_kernel, (programs,), tensors, (*strides, *grids.on_map), constants)


def launch_backward(
    grids: Grids,
    grad_out: Tensor,
    inputs: tuple[Tensor, ...],
    padding: Tensor | None,
    tables: tuple[Tensor, Tensor],
    out: Tensor,
    sums: Tensor,
    grads: tuple[Tensor, ...],
    strides: tuple[Strides, ...],
    grad_strides: Strides,
    grad_padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fills grads, those of q, k and v, all of grad_strides; strides are those of grad_out, of q, of k and v, and of
    out. Where grids hang over the border, fills the k and v of grad_padding (3, heads, head_dim). Returns the
    gradients of both tables."""
    grad_q, grad_k, grad_v = grads
    queries, keys, of_tables = (
        _constants_of(grids, kernel, out) for kernel in ("backward_queries", "backward_keys", "backward_tables")
    )
    units, height, width, tokens = grids.units, grids.height, grids.width, grids.tokens
    rel = sums.new_empty(units, height + width, tokens)
    statistics = sums.new_empty(units, 3, tokens)
    grad_rel_h = sums.new_empty(units, ceil_div(width, queries["BLOCK_X"]), height, tokens)
    grad_rel_w = sums.new_empty(units, tokens, width)
    programs = units * ceil_div(tokens, queries["BLOCK_M"])
    tensors = grad_out, *inputs, padding, *tables, out, sums, grad_q, rel, statistics, grad_rel_h, grad_rel_w
    numbers = *strides, grad_strides, *grids.on_map
    direct_launch.run(backward_queries_kernel, (programs,), tensors, numbers, queries)

    tiles = ceil_div(height, keys["BLOCK_N"] // keys["BLOCK_X"]) * ceil_div(width, keys["BLOCK_X"])
    parts = sums.new_empty(units // grids.heads * tiles, 2, grids.heads, grids.head_dim) if grids.padded else None
    given = grad_out, *inputs, padding, rel, statistics, grad_k, grad_v, parts
    numbers = *strides[:3], grad_strides, *grids.on_map
    direct_launch.run(backward_keys_kernel, (units * tiles,), given, numbers, keys)
    if parts is not None and grad_padding is not None:
        _sum_parts(parts, grad_padding[1], grad_padding[2])

    grad_tables = torch.empty_like(tables[0]), torch.empty_like(tables[1])
    splits = min(units * ceil_div(tokens, of_tables["BLOCK_M"]), TABLE_SPLITS)
    parts = sums.new_empty(splits, 2 * (height + width - 1), grids.head_dim)
    blocks = ceil_div(2 * height - 1, of_tables["BLOCK_O"]) + ceil_div(2 * width - 1, of_tables["BLOCK_O"])
    summands, sizes = (inputs[0], grad_rel_h, grad_rel_w, parts), (strides[1], *grids.on_map, units)
    direct_launch.run(backward_tables_kernel, (blocks, splits), summands, sizes, of_tables)
    _sum_parts(parts, *grad_tables)
    return grad_tables


def _sum_parts(parts: Tensor, first: Tensor, second: Tensor) -> None:
    size = first.numel() + second.numel()
    sizes, settings = (parts.shape[0], first.numel(), size), {"BLOCK": SUM_BLOCK, "num_warps": 4}
    direct_launch.run(sum_parts_kernel, (ceil_div(size, SUM_BLOCK),), (parts, first, second), sizes, settings)
