"""The backward of grid_attention.py, its sums over queries: gradients of keys and values, and of the tables.

    dv = p^T g        dk = D^-1/2 dS^T q        dtable[o] = sum over i of drel[i, the key at offset o] q_i

Each sum belongs to one program, or is cut into parts by the shape alone which are added in order.
"""

import triton
import triton.language as tl

from .grid_attention import (
    LOG2E,
    exponential,
    key_places,
    load_keys_and_values,
    load_queries,
    num_queries,
    query_places,
    unit_place,
    unit_start,
)
from .grid_attention_backward import load_by_offset
from .matrix_product import kept


@triton.jit
def backward_keys_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    padding_ptr,
    rel_ptr,
    statistics_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_padding_ptr,
    grad_out_strides,
    q_strides,
    kv_strides,
    grad_k_strides,
    heads,
    map_height,
    map_width,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PADDED: tl.constexpr,
    CORRECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_k and grad_v of BLOCK_N keys; the sums of those off the map in (unit // heads, tile, 2, heads, HEAD_DIM)."""
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    ROWS: tl.constexpr = BLOCK_N // BLOCK_X
    WHOLE: tl.constexpr = not PADDED and TOKENS % BLOCK_M == 0
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tiles_y: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    tiles: tl.constexpr = (WIDTH + BLOCK_X - 1) // BLOCK_X * tiles_y
    unit, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_y, first_x = tile % tiles_y * ROWS, tile // tiles_y * BLOCK_X
    place = unit_place(unit, heads, map_height, map_width, HEIGHT, WIDTH)
    count = num_queries(place, map_height, HEIGHT, WIDTH)

    k_ptr += unit_start(place, kv_strides)
    v_ptr += unit_start(place, kv_strides)
    key, value = load_keys_and_values(
        k_ptr, v_ptr, kv_strides, padding_ptr, first_y, first_x, place, heads, map_height, map_width,
        HEIGHT, WIDTH, HEAD_DIM, PADDED, BLOCK_N, BLOCK_X, BLOCK_D,
    )  # fmt: skip
    q_ptr += unit_start(place, q_strides)
    grad_out_ptr += unit_start(place, grad_out_strides)
    rel_ptr += unit.to(tl.int64) * (HEIGHT + WIDTH) * TOKENS
    statistics_ptr += unit.to(tl.int64) * 3 * TOKENS
    rows, columns = first_y + tl.arange(0, ROWS), first_x + tl.arange(0, BLOCK_X)
    is_row, is_column = (rows < HEIGHT) | (HEIGHT % ROWS == 0), (columns < WIDTH) | (WIDTH % BLOCK_X == 0)

    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, count, BLOCK_M):
        y, x, real = query_places(first, count, place, map_height, map_width, WIDTH, WHOLE, BLOCK_M)
        token = first + tl.arange(0, BLOCK_M)
        written = (token < count) | WHOLE
        q = load_queries(q_ptr, y, x, real, q_strides, HEAD_DIM, BLOCK_D)
        grad_out = load_queries(grad_out_ptr, y, x, real, grad_out_strides, HEAD_DIM, BLOCK_D)
        rel_h_at = rel_ptr + (rows[:, None] * TOKENS + token[None, :])
        rel_h = tl.load(rel_h_at, mask=is_row[:, None] & written[None, :], other=float("-inf"))
        rel_w_at = rel_ptr + ((HEIGHT + columns)[:, None] * TOKENS + token[None, :])
        rel_w = tl.load(rel_w_at, mask=is_column[:, None] & written[None, :], other=float("-inf"))
        shift = tl.load(statistics_ptr + token, mask=written, other=0.0)
        delta = tl.load(statistics_ptr + TOKENS + token, mask=written, other=0.0)
        s = tl.reshape(tl.dot(kept(key, first, PRECISION), q.T, input_precision=PRECISION), (ROWS, BLOCK_X, BLOCK_M))
        t = s * (SCALE if EXACT else SCALE * LOG2E) + rel_w[None, :, :]
        p = exponential(t - (shift[None, :] - rel_h)[:, None, :], EXACT)
        if CORRECTED:
            p *= tl.load(statistics_ptr + 2 * TOKENS + token, mask=written, other=0.0)[None, None, :]
        operand = tl.reshape(p, (BLOCK_N, BLOCK_M)).to(grad_out.dtype)
        grad_v = tl.dot(operand, grad_out, grad_v, input_precision=PRECISION)
        grad_p = tl.reshape(tl.dot(kept(value, first, PRECISION), grad_out.T, input_precision=PRECISION), p.shape)
        grad_s = tl.reshape(p * (grad_p - delta[None, None, :]), (BLOCK_N, BLOCK_M)).to(q.dtype)
        grad_k = tl.dot(grad_s, q, grad_k, input_precision=PRECISION)
    grad_k *= SCALE

    inside, on_map = key_places(first_y, first_x, place, map_height, map_width, HEIGHT, WIDTH, PADDED, BLOCK_N, BLOCK_X)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key_y, key_x = (first_y + n // BLOCK_X).to(tl.int64), (first_x + n % BLOCK_X).to(tl.int64)
    at = unit_start(place, grad_k_strides) + key_y * grad_k_strides[2] + key_x * grad_k_strides[3]
    mask = on_map[:, None] & ((d < HEAD_DIM) | (HEAD_DIM == BLOCK_D))
    tl.store(grad_k_ptr + at[:, None] + d, grad_k, mask=mask)
    tl.store(grad_v_ptr + at[:, None] + d, grad_v, mask=mask)
    if PADDED:
        off_map = (inside & ~on_map)[:, None]
        part = (unit // heads).to(tl.int64) * tiles + tile
        grad_padding_ptr += (part * 2 * heads + place[1]) * HEAD_DIM + d
        tl.store(grad_padding_ptr, tl.sum(tl.where(off_map, grad_k, 0.0), 0), mask=d < HEAD_DIM)
        tl.store(grad_padding_ptr + heads * HEAD_DIM, tl.sum(tl.where(off_map, grad_v, 0.0), 0), mask=d < HEAD_DIM)


@triton.jit
def table_gradient(
    q_ptr, grad_rel_ptr, q_strides, heads, map_height, map_width, unit_stride, key_stride, token_stride, copy_stride,
    first_offset, units, split, num_splits, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BY_ROW: tl.constexpr,
    COPIES: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A split's part of the gradient of BLOCK_O rows of a table, (BLOCK_O, BLOCK_D)."""
    SIZE: tl.constexpr = HEIGHT if BY_ROW else WIDTH
    WHOLE: tl.constexpr = not PADDED and HEIGHT * WIDTH % BLOCK_M == 0
    tiles: tl.constexpr = (HEIGHT * WIDTH + BLOCK_M - 1) // BLOCK_M
    grad_table = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    if SIZE > 1:
        for index in range(split, units * tiles, num_splits):
            index = tl.cast(index, tl.int32)
            unit, first = index // tiles, index % tiles * BLOCK_M
            place = unit_place(unit, heads, map_height, map_width, HEIGHT, WIDTH)
            count = num_queries(place, map_height, HEIGHT, WIDTH)
            y, x, real = query_places(first, count, place, map_height, map_width, WIDTH, WHOLE, BLOCK_M)
            q = load_queries(q_ptr + unit_start(place, q_strides), y, x, real, q_strides, HEAD_DIM, BLOCK_D)
            grad_rel = load_by_offset(
                grad_rel_ptr + unit.to(tl.int64) * unit_stride, first + tl.arange(0, BLOCK_M), y if BY_ROW else x,
                key_stride, token_stride, copy_stride, first_offset, real, SIZE, COPIES, BLOCK_O,
            )  # fmt: skip
            grad_table = tl.dot(grad_rel.to(q.dtype).T, q, grad_table, input_precision=PRECISION)
    return grad_table


@triton.jit
def backward_tables_kernel(
    q_ptr,
    grad_rel_h_ptr,
    grad_rel_w_ptr,
    partial_ptr,
    q_strides,
    heads,
    map_height,
    map_width,
    units,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Parts of the gradients of both tables, one below the other: (split, 2 HEIGHT - 1 + 2 WIDTH - 1, HEAD_DIM)."""
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    COPIES: tl.constexpr = (WIDTH + BLOCK_X - 1) // BLOCK_X
    ROWS_H: tl.constexpr = 2 * HEIGHT - 1
    ROWS_W: tl.constexpr = 2 * WIDTH - 1
    BLOCKS_H: tl.constexpr = (ROWS_H + BLOCK_O - 1) // BLOCK_O
    block, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offset, d = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_D)
    partial_ptr += split.to(tl.int64) * (ROWS_H + ROWS_W) * HEAD_DIM
    if block < BLOCKS_H:
        first_offset = block * BLOCK_O
        grad_table = table_gradient(
            q_ptr, grad_rel_h_ptr, q_strides, heads, map_height, map_width, COPIES * HEIGHT * TOKENS, TOKENS, 1,
            HEIGHT * TOKENS, first_offset, units, split, num_splits, HEIGHT, WIDTH, True, COPIES, HEAD_DIM, PRECISION,
            PADDED, BLOCK_D, BLOCK_O, BLOCK_M,
        )  # fmt: skip
        row, rows = first_offset + offset, ROWS_H
    else:
        first_offset = (block - BLOCKS_H) * BLOCK_O
        grad_table = table_gradient(
            q_ptr, grad_rel_w_ptr, q_strides, heads, map_height, map_width, TOKENS * WIDTH, 1, WIDTH, 0, first_offset,
            units, split, num_splits, HEIGHT, WIDTH, False, 1, HEAD_DIM, PRECISION, PADDED, BLOCK_D, BLOCK_O, BLOCK_M,
        )  # fmt: skip
        partial_ptr += ROWS_H * HEAD_DIM
        row, rows = first_offset + offset, ROWS_W
    mask = (row < rows)[:, None] & (d < HEAD_DIM)
    tl.store(partial_ptr + row[:, None] * HEAD_DIM + d, grad_table, mask=mask)


@triton.jit
def sum_parts_kernel(parts_ptr, first_ptr, second_ptr, count, first_size, size, BLOCK: tl.constexpr):
    """The sums over (count, size): the first ones to first_ptr, those behind to second_ptr."""
    LANES: tl.constexpr = 16
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    totals = tl.zeros((LANES, BLOCK), tl.float32)
    for first in range(0, count, LANES):
        part = first + tl.arange(0, LANES)
        mask = (part < count)[:, None] & (at < size)[None, :]
        totals += tl.load(parts_ptr + part.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
    total = tl.sum(totals, 0)
    tl.store(first_ptr + at, total, mask=at < first_size)
    tl.store(second_ptr + (at - first_size), total, mask=(at >= first_size) & (at < size))
