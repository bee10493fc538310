"""The backward of grid_attention.py, deterministic: every sum belongs to one program.

With g the gradient of o:

    dP = g v^T      delta_i = g_i . o_i      dS = p (dP - delta)      dv = p^T g      dk = D^-1/2 dS^T q
    drel_h[i, y'] = sum of dS_ij over the keys of image row y'        drel_w[i, x'] alike over columns
    dq = D^-1/2 dS k + drel_h table_h + drel_w table_w                dtable = drel^T q, both by relative offset

Programs of queries come first and leave what programs of keys and of table rows read: rel, the statistics and drel.
"""

import triton
import triton.language as tl

from .grid_attention import (
    exponential,
    load_keys_and_values,
    load_positions,
    load_queries,
    num_queries,
    query_places,
    scores,
    statistics_start,
    store_positions,
    unit_place,
    unit_start,
)


@triton.jit
def load_by_offset(
    ptr, token, place, key_stride, token_stride, copy_stride, first, real, SIZE: tl.constexpr, COPIES: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """drel of queries by the row of the table that it belongs to, (BLOCK_M, BLOCK_O); `place` is theirs on the axis."""
    key = place[:, None] + (SIZE - 1) - (first + tl.arange(0, BLOCK_O))[None, :]
    mask = (key >= 0) & (key < SIZE) & real[:, None]
    ptr += key * key_stride + (token * token_stride)[:, None]
    grad = tl.load(ptr, mask=mask, other=0.0)
    for copy in range(1, COPIES):
        grad += tl.load(ptr + copy * copy_stride, mask=mask, other=0.0)
    return grad


@triton.jit
def add_positions(
    grad_q, ptr, table_ptr, token, place, key_stride, token_stride, copy_stride, real, SIZE: tl.constexpr,
    COPIES: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """grad_q and what an axis adds to it."""
    BLOCK: tl.constexpr = BLOCK_O if BLOCK_O < 64 else 64  # each number has an address, of two registers
    d = tl.arange(0, BLOCK_D)
    for first in tl.range(0, 2 * SIZE - 1, BLOCK, num_stages=1):
        offset = first + tl.arange(0, BLOCK)
        mask = (offset < 2 * SIZE - 1)[:, None] & (d < HEAD_DIM)
        table = tl.load(table_ptr + offset[:, None] * HEAD_DIM + d, mask=mask, other=0.0)
        grad = load_by_offset(
            ptr, token, place, key_stride, token_stride, copy_stride, first, real, SIZE, COPIES, BLOCK
        )
        grad_q = tl.dot(grad.to(table.dtype), table, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit
def backward_queries_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    padding_ptr,
    table_h_ptr,
    table_w_ptr,
    out_ptr,
    sums_ptr,
    grad_q_ptr,
    rel_ptr,
    statistics_ptr,
    grad_rel_h_ptr,
    grad_rel_w_ptr,
    grad_out_strides,
    q_strides,
    kv_strides,
    out_strides,
    grad_q_strides,
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
    BLOCK_O: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_q, and for the kernels behind: rel (unit, HEIGHT + WIDTH, TOKENS), statistics (unit, 3, TOKENS), grad_rel_h
    (unit, a copy for each BLOCK_X of columns, HEIGHT, TOKENS) and grad_rel_w (unit, TOKENS, WIDTH)."""
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    ROWS: tl.constexpr = BLOCK_N // BLOCK_X
    COPIES: tl.constexpr = (WIDTH + BLOCK_X - 1) // BLOCK_X
    WHOLE: tl.constexpr = not PADDED and TOKENS % BLOCK_M == 0
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tiles: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    unit, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    place = unit_place(unit, heads, map_height, map_width, HEIGHT, WIDTH)
    count = num_queries(place, map_height, HEIGHT, WIDTH)
    if first >= count:
        return

    y, x, real = query_places(first, count, place, map_height, map_width, WIDTH, WHOLE, BLOCK_M)
    token = first + tl.arange(0, BLOCK_M)
    in_grid = (token < TOKENS) | WHOLE
    q = load_queries(q_ptr + unit_start(place, q_strides), y, x, real, q_strides, HEAD_DIM, BLOCK_D)
    grad_out_ptr += unit_start(place, grad_out_strides)
    grad_out = load_queries(grad_out_ptr, y, x, real, grad_out_strides, HEAD_DIM, BLOCK_D)
    out = load_queries(out_ptr + unit_start(place, out_strides), y, x, real, out_strides, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    sums_ptr += 2 * (statistics_start(place, heads, map_height, map_width) + y.to(tl.int64) * map_width + x)
    shift = tl.load(sums_ptr, mask=real, other=0.0)
    total = tl.load(sums_ptr + 1, mask=real, other=1.0)
    k_ptr += unit_start(place, kv_strides)
    v_ptr += unit_start(place, kv_strides)
    unit = unit.to(tl.int64)
    rel_ptr += unit * (HEIGHT + WIDTH) * TOKENS
    grad_rel_h_ptr += unit * COPIES * HEIGHT * TOKENS
    grad_rel_w_ptr += unit * TOKENS * WIDTH
    statistics_ptr += unit * 3 * TOKENS + token
    rel_w_ptr = rel_ptr + HEIGHT * TOKENS
    store_positions(rel_ptr, q, table_h_ptr, token, y, TOKENS, HEIGHT, HEAD_DIM, PRECISION, BLOCK_D, BLOCK_X, BLOCK_O)
    store_positions(rel_w_ptr, q, table_w_ptr, token, x, TOKENS, WIDTH, HEAD_DIM, PRECISION, BLOCK_D, BLOCK_X, BLOCK_O)
    tl.debug_barrier()

    if CORRECTED:
        # The rounding of the sum's logarithm would be seen, and that of `out` where a softmax is almost one key's: p
        # is exact up to a factor, and delta is corrected by what it leaves of the sum of p (dP - delta), which is 0.
        total = tl.zeros((BLOCK_M,), tl.float32)
        left = tl.zeros((BLOCK_M,), tl.float32)
        for first_x in range(0, WIDTH, BLOCK_X):
            rel_w = load_positions(rel_w_ptr, first_x, token, WIDTH, TOKENS, WHOLE, BLOCK_X)
            for first_y in range(0, HEIGHT, ROWS):
                key, value = load_keys_and_values(
                    k_ptr, v_ptr, kv_strides, padding_ptr, first_y, first_x, place, heads, map_height, map_width,
                    HEIGHT, WIDTH, HEAD_DIM, PADDED, BLOCK_N, BLOCK_X, BLOCK_D,
                )  # fmt: skip
                rel_h = load_positions(rel_ptr, first_y, token, HEIGHT, TOKENS, WHOLE, ROWS)
                t = scores(q, key, rel_w, SCALE, PRECISION)
                p = exponential(t - (shift[:, None] - rel_h)[:, :, None], EXACT)
                grad_p = tl.reshape(tl.dot(grad_out, value.T, input_precision=PRECISION), p.shape)
                total += tl.sum(tl.sum(p, 1), 1)
                left += tl.sum(tl.sum(p * (grad_p - delta[:, None, None]), 1), 1)
        factor = 1.0 / total
        delta += left * factor
    else:
        shift += tl.log2(total)
        factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    tl.store(statistics_ptr, shift, mask=in_grid)
    tl.store(statistics_ptr + TOKENS, delta, mask=in_grid)
    tl.store(statistics_ptr + 2 * TOKENS, factor, mask=in_grid)

    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_x in range(0, WIDTH, BLOCK_X):
        rel_w = load_positions(rel_w_ptr, first_x, token, WIDTH, TOKENS, WHOLE, BLOCK_X)
        grad_rel_w = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
        for first_y in range(0, HEIGHT, ROWS):
            key, value = load_keys_and_values(
                k_ptr, v_ptr, kv_strides, padding_ptr, first_y, first_x, place, heads, map_height, map_width,
                HEIGHT, WIDTH, HEAD_DIM, PADDED, BLOCK_N, BLOCK_X, BLOCK_D,
            )  # fmt: skip
            rel_h = load_positions(rel_ptr, first_y, token, HEIGHT, TOKENS, WHOLE, ROWS)
            t = scores(q, key, rel_w, SCALE, PRECISION)
            p = exponential(t - (shift[:, None] - rel_h)[:, :, None], EXACT)
            grad_p = tl.reshape(tl.dot(grad_out, value.T, input_precision=PRECISION), p.shape)
            if CORRECTED:
                p *= factor[:, None, None]
            grad_s = p * (grad_p - delta[:, None, None])
            grad_rel_w += tl.sum(grad_s, 1)
            rows = first_y + tl.arange(0, ROWS)
            rows_mask = in_grid[:, None] & ((rows < HEIGHT) | (HEIGHT % ROWS == 0))[None, :]
            at = (first_x // BLOCK_X * HEIGHT + rows).to(tl.int64)[None, :] * TOKENS + token[:, None]
            tl.store(grad_rel_h_ptr + at, tl.sum(grad_s, 2), mask=rows_mask)
            grad_s = tl.reshape(grad_s, (BLOCK_M, BLOCK_N)).to(key.dtype)
            grad_q = tl.dot(grad_s, key, grad_q, input_precision=PRECISION)
        columns = first_x + tl.arange(0, BLOCK_X)
        mask = in_grid[:, None] & ((columns < WIDTH) | (WIDTH % BLOCK_X == 0))[None, :]
        tl.store(grad_rel_w_ptr + token.to(tl.int64)[:, None] * WIDTH + columns[None, :], grad_rel_w, mask=mask)
    tl.debug_barrier()

    grad_q *= SCALE
    # What is added to all scores alike the softmax does not see: one row, or one column, has no gradient.
    if HEIGHT > 1:
        grad_q = add_positions(
            grad_q, grad_rel_h_ptr, table_h_ptr, token, y, TOKENS, 1, HEIGHT * TOKENS, real, HEIGHT, COPIES, HEAD_DIM,
            PRECISION, BLOCK_D, BLOCK_O,
        )  # fmt: skip
    if WIDTH > 1:
        grad_q = add_positions(
            grad_q, grad_rel_w_ptr, table_w_ptr, token, x, 1, WIDTH, 0, real, WIDTH, 1, HEAD_DIM, PRECISION, BLOCK_D,
            BLOCK_O,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    grad_q_ptr += unit_start(place, grad_q_strides)
    grad_q_rows = grad_q_ptr + y.to(tl.int64) * grad_q_strides[2] + x.to(tl.int64) * grad_q_strides[3]
    tl.store(grad_q_rows[:, None] + d, grad_q, mask=real[:, None] & ((d < HEAD_DIM) | (HEAD_DIM == BLOCK_D)))
