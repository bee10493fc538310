"""Linear layers with a weight of integers in Triton: the integers become floats in the registers of a tile's load.

The weight is the left operand of the product, y^T = W x^T: tensor cores take that one from registers, where the
integers are unpacked, and the few rows of a decoding step fill the narrow side of a tile. Each block of rows unpacks
the weight anew, and the tensor cores wait for it; many rows, and gradients, are multiplied by torch with a weight that
is unpacked once.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch
from .launch import ceil_div, next_power_of_2, settings
from .matrix_product import input_precision, operand_bits

# The most rows that are multiplied as the weight is unpacked. Counted in Hopper's code, unpacking takes a tile of 128
# rows as long as multiplying it does, and the two wait for each other: from some 400 rows on it takes less to write the
# weight and read it again, for which there has to be room. Not measured.
MAX_UNPACKED = 512


@triton.jit
def _load_weight(
    values_ptr, scales_ptr, rows, first, num_rows, num_cols, row_bytes, dtype: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W (rows, BLOCK) from column `first` on, without its scales where GROUP is 0; finite past the last column."""
    if BITS == 8:
        cols = first + tl.arange(0, BLOCK)
        mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        weight = tl.load(values_ptr + rows[:, None] * num_cols + cols[None, :], mask=mask, other=0).to(dtype)
    else:
        cols = first // 2 + tl.arange(0, BLOCK // 2)
        mask = (rows < num_rows)[:, None] & (cols < row_bytes)[None, :]
        pairs = tl.load(values_ptr + rows[:, None] * row_bytes + cols[None, :], mask=mask, other=0)
        weight = tl.interleave(_nibble(pairs & 15, dtype), _nibble(pairs >> 4, dtype))
    if GROUP != 0:
        num_groups = num_cols // GROUP
        if BLOCK <= GROUP:
            scales = tl.load(scales_ptr + rows * num_groups + first // GROUP, mask=rows < num_rows, other=0.0)
            weight = (weight.to(tl.float32) * scales[:, None]).to(dtype)
        else:
            groups = first // GROUP + tl.arange(0, BLOCK // GROUP)
            mask = (rows < num_rows)[:, None] & (groups < num_groups)[None, :]
            scales = tl.load(scales_ptr + rows[:, None] * num_groups + groups[None, :], mask=mask, other=0.0)
            grouped = weight.reshape(rows.shape[0], BLOCK // GROUP, GROUP).to(tl.float32) * scales[:, :, None]
            weight = grouped.reshape(rows.shape[0], BLOCK).to(dtype)
    return weight


@triton.jit
def _nibble(bits, dtype: tl.constexpr):
    """bits - 8 in `dtype`, 0..15 being the last bits of a float of a known exponent."""
    if dtype == tl.bfloat16:
        return (bits.to(tl.int16) | 0x4300).to(dtype, bitcast=True) - 136.0
    elif dtype == tl.float16:
        return (bits.to(tl.int16) | 0x6400).to(dtype, bitcast=True) - 1032.0
    else:
        return (bits.to(tl.int32) | 0x4B000000).to(dtype, bitcast=True) - 8388616.0


@triton.jit
def _forward_kernel(
    x_ptr, values_ptr, scales_ptr, bias_ptr, y_ptr, num_rows, num_outputs, num_inputs, row_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # In float32, where it is the sums that err, each block has its own, and one scale where it is of one group.
    BLOCKWISE: tl.constexpr = dtype == tl.float32 and (GROUP == 0 or BLOCK_K <= GROUP)
    SCALED: tl.constexpr = 0 if BLOCKWISE else GROUP
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    for first in range(0, num_inputs, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        mask = (cols < num_inputs)[:, None] & (rows < num_rows)[None, :]
        x = tl.load(x_ptr + rows[None, :] * num_inputs + cols[:, None], mask=mask, other=0.0)
        weight = _load_weight(
            values_ptr, scales_ptr, outputs, first, num_outputs, num_inputs, row_bytes, dtype, BITS, SCALED, BLOCK_K
        )
        if BLOCKWISE:
            scale = scales_ptr + (outputs if GROUP == 0 else outputs * (num_inputs // GROUP) + first // GROUP)
            scales = tl.load(scale, mask=outputs < num_outputs, other=0.0)
            sums += tl.dot(weight, x, input_precision=PRECISION) * scales[:, None]
        else:
            sums = tl.dot(weight, x, sums, input_precision=PRECISION)

    if GROUP == 0 and not BLOCKWISE:
        sums *= tl.load(scales_ptr + outputs, mask=outputs < num_outputs, other=0.0)[:, None]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[:, None]
    mask = (outputs < num_outputs)[:, None] & (rows < num_rows)[None, :]
    tl.store(y_ptr + rows[None, :] * num_outputs + outputs[:, None], sums, mask=mask)


@triton.jit
def _dequantize_kernel(
    values_ptr, scales_ptr, weight_ptr, num_outputs, num_inputs, row_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    weight = _load_weight(
        values_ptr, scales_ptr, outputs, first, num_outputs, num_inputs, row_bytes, dtype, BITS, GROUP, BLOCK_K
    )
    if GROUP == 0:
        scales = tl.load(scales_ptr + outputs, mask=outputs < num_outputs, other=0.0)
        weight = (weight.to(tl.float32) * scales[:, None]).to(dtype)
    cols = first + tl.arange(0, BLOCK_K)
    mask = (outputs < num_outputs)[:, None] & (cols < num_inputs)[None, :]
    tl.store(weight_ptr + outputs[:, None] * num_inputs + cols[None, :], weight, mask=mask)


def forward(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """x (..., K) contiguous -> y (..., N) of x's dtype."""
    num_outputs, num_inputs = values.shape[0], x.shape[-1]
    num_rows = math.prod(x.shape[:-1])
    if num_rows > MAX_UNPACKED:
        return F.linear(x, dequantize(values, scales, num_inputs, bits, x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], num_outputs)
    if y.numel():
        values, scales = values.contiguous(), scales.contiguous()
        precision = input_precision(x.dtype)
        table = settings(
            "quantized_linear",
            "_forward_kernel",
            x.device,
            rows=next_power_of_2(num_rows),
            bits=bits,
            element_bits=operand_bits(x.dtype, precision),
        )
        grid = ceil_div(num_rows, table["BLOCK_M"]), ceil_div(num_outputs, table["BLOCK_N"])
        sizes = num_rows, num_outputs, num_inputs, values.shape[1]
        constants = {"BITS": bits, "GROUP": _group(scales, num_inputs), "PRECISION": precision}
        direct_launch.run(_forward_kernel, grid, (x, values, scales, bias, y), sizes, constants | table)
    return y


def backward(grad_y: Tensor, values: Tensor, scales: Tensor, num_inputs: int, bits: int) -> Tensor:
    """grad_y (..., N) contiguous -> grad_x (..., num_inputs)."""
    return grad_y @ dequantize(values, scales, num_inputs, bits, grad_y.dtype)


def dequantize(values: Tensor, scales: Tensor, num_inputs: int, bits: int, dtype: torch.dtype) -> Tensor:
    """-> the weight (N, num_inputs), rounded to `dtype`."""
    values, scales = values.contiguous(), scales.contiguous()
    num_outputs, row_bytes = values.shape
    weight = values.new_empty(num_outputs, num_inputs, dtype=dtype)
    if weight.numel():
        table = settings("quantized_linear", "_dequantize_kernel", values.device)
        grid = ceil_div(num_outputs, table["BLOCK_N"]), ceil_div(num_inputs, table["BLOCK_K"])
        sizes = num_outputs, num_inputs, row_bytes
        constants = {"BITS": bits, "GROUP": _group(scales, num_inputs)}
        direct_launch.run(_dequantize_kernel, grid, (values, scales, weight), sizes, constants | table)
    return weight


def _group(scales: Tensor, num_inputs: int) -> int:
    """Inputs that share a scale; 0: all of a row do."""
    return 0 if scales.shape[1] == 1 else num_inputs // scales.shape[1]
