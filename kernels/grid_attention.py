"""Attention with decomposed relative positions in Triton: what rel_pos_attention and window_attention share, and the
forward. docs/rel_pos_attention.md derives it.

    t_ij = q_i . k_j D^-1/2 + rel_h[i, y'] + rel_w[i, x']      o_i = sum_j exp(t_ij - m_i) v_j / sum_j exp(t_ij - m_i)

A unit is a head of one grid: the whole map, or a window of it. A program takes BLOCK_M queries of a unit over tiles of
BLOCK_N keys, pieces of image rows that are BLOCK_X wide: rel_w is then one tile for all image rows, added to the scores
by the FMA that scales them, and rel_h a number a query and image row, subtracted along with the maximum.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def unit_place(unit, heads, map_height, map_width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Of a unit: its map in the batch, its head, and where its grid begins on the map."""
    window = unit // heads
    down, across = tl.cdiv(map_height, HEIGHT), tl.cdiv(map_width, WIDTH)
    top, left = (window // across) % down * HEIGHT, window % across * WIDTH
    return (window // (across * down)).to(tl.int64), (unit % heads).to(tl.int64), top.to(tl.int64), left.to(tl.int64)


@triton.jit
def unit_start(place, strides):
    """The offset of a unit in a tensor with the strides (batch, head, y, x)."""
    return place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2] + place[3] * strides[3]


@triton.jit
def statistics_start(place, heads, map_height, map_width):
    """The same in (batch, head, map_height, map_width)."""
    return ((place[0] * heads + place[1]) * map_height + place[2]) * map_width + place[3]


@triton.jit
def num_queries(place, map_height, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Queries up to the last image row of a grid that is on the map."""
    return tl.minimum(map_height - place[2], HEIGHT).to(tl.int32) * WIDTH


@triton.jit
def query_places(
    first, count, place, map_height, map_width, WIDTH: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Of BLOCK_M queries: y, x, and which are on the map. WHOLE: all are, whatever their number."""
    token = first + tl.arange(0, BLOCK_M)
    y, x = token // WIDTH, token % WIDTH
    return y, x, (token < count) & (place[3] + x < map_width) | WHOLE


@triton.jit
def load_queries(ptr, y, x, real, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_M, BLOCK_D), zeros where no query is."""
    d = tl.arange(0, BLOCK_D)
    rows = ptr + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return tl.load(rows[:, None] + d, mask=real[:, None] & ((d < HEAD_DIM) | (HEAD_DIM == BLOCK_D)), other=0.0)


@triton.jit
def key_places(
    first_y, first_x, place, map_height, map_width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N keys, BLOCK_X of each image row: which are in the grid, and which of them on the map."""
    n = tl.arange(0, BLOCK_N)
    y, x = first_y + n // BLOCK_X, first_x + n % BLOCK_X
    inside = (y < HEIGHT) | (HEIGHT % (BLOCK_N // BLOCK_X) == 0)
    inside = inside & ((x < WIDTH) | (WIDTH % BLOCK_X == 0))
    if PADDED:
        return inside, inside & (place[2] + y < map_height) & (place[3] + x < map_width)
    else:
        return inside, inside


@triton.jit
def load_keys_and_values(
    k_ptr, v_ptr, strides, padding_ptr, first_y, first_x, place, heads, map_height, map_width, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_D) twice, of a unit whose first key and value k_ptr and v_ptr point at: off the map what
    padding_ptr holds, zeros where it is None or no key is."""
    inside, on_map = key_places(first_y, first_x, place, map_height, map_width, HEIGHT, WIDTH, PADDED, BLOCK_N, BLOCK_X)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    first = tl.cast(first_y, tl.int64) * strides[2] + tl.cast(first_x, tl.int64) * strides[3]
    at = ((n // BLOCK_X).to(tl.int64) * strides[2] + (n % BLOCK_X).to(tl.int64) * strides[3])[:, None] + d
    keys, values = k_ptr + first + at, v_ptr + first + at
    if PADDED and padding_ptr is not None:
        padding = padding_ptr + (heads + place[1]) * HEAD_DIM + d[None, :]
        keys = tl.where(on_map[:, None], keys, padding)
        values = tl.where(on_map[:, None], values, padding + heads * HEAD_DIM)
        on_map = inside
    mask = on_map[:, None] & ((d < HEAD_DIM) | (HEAD_DIM == BLOCK_D))
    return tl.load(keys, mask=mask, other=0.0), tl.load(values, mask=mask, other=0.0)


@triton.jit
def positions(
    q,
    table_ptr,
    place,
    keys,
    SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """What the keys at `keys` of an axis add to the scores of the queries q at `place`, in the softmax's unit; -inf
    where no key is. Queries are multiplied by the table as it stands, and each picks its own offsets."""
    d = tl.arange(0, BLOCK_D)
    offsets = place[:, None] - keys[None, :] + (SIZE - 1)
    rel = tl.zeros(offsets.shape, tl.float32)
    for first in tl.range(0, 2 * SIZE - 1, BLOCK_O, num_stages=1):
        offset = first + tl.arange(0, BLOCK_O)
        mask = (offset < 2 * SIZE - 1)[:, None] & (d < HEAD_DIM)
        table = tl.load(table_ptr + offset[:, None] * HEAD_DIM + d, mask=mask, other=0.0)
        products = tl.dot(q, table.T, input_precision=PRECISION)
        at = offsets - first
        here = (at >= 0) & (at < BLOCK_O)
        rel = tl.where(here, tl.gather(products, tl.where(here, at, 0), 1), rel)
    if q.dtype != tl.float32:
        rel *= LOG2E
    return tl.where((keys < SIZE)[None, :], rel, float("-inf"))


@triton.jit
def store_positions(
    to_ptr, q, table_ptr, token, place, TOKENS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Writes what an axis adds to the scores of queries to (SIZE, TOKENS). A barrier, and their program can read it."""
    for first in range(0, SIZE, BLOCK_X):
        keys = first + tl.arange(0, BLOCK_X)
        rel = positions(q, table_ptr, place, keys, SIZE, HEAD_DIM, PRECISION, BLOCK_D, BLOCK_O)
        mask = (token < TOKENS)[:, None] & (keys < SIZE)[None, :]
        tl.store(to_ptr + keys.to(tl.int64)[None, :] * TOKENS + token[:, None], rel, mask=mask)


@triton.jit
def load_positions(
    ptr, first, token, SIZE: tl.constexpr, TOKENS: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr
):
    """What an axis adds to the scores of queries for COUNT keys from the first on, (BLOCK_M, COUNT); -inf where no key
    is."""
    key = first + tl.arange(0, COUNT)
    mask = ((token < TOKENS) | WHOLE)[:, None] & ((key < SIZE) | (SIZE % COUNT == 0))[None, :]
    rel = tl.load(ptr + key.to(tl.int64)[None, :] * TOKENS + token[:, None], mask=mask, other=0.0)
    return rel if SIZE % COUNT == 0 else tl.where((key < SIZE)[None, :], rel, float("-inf"))


@triton.jit
def scores(q, key, rel_w, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """(BLOCK_M, image rows, BLOCK_X): scores less rel_h. In units of log 2, with which the softmax is exp2; in float32
    the rounding of that product would be seen where scores are large."""
    shape: tl.constexpr = (q.shape[0], key.shape[0] // rel_w.shape[1], rel_w.shape[1])
    factor: tl.constexpr = SCALE if q.dtype == tl.float32 else SCALE * LOG2E
    return tl.reshape(tl.dot(q, key.T, input_precision=PRECISION), shape) * factor + rel_w[:, None, :]


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    return tl.exp(x) if EXACT else tl.exp2(x)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    padding_ptr,
    table_h_ptr,
    table_w_ptr,
    out_ptr,
    sums_ptr,
    rel_h_ptr,
    q_strides,
    kv_strides,
    out_strides,
    heads,
    map_height,
    map_width,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TOKENS: tl.constexpr = HEIGHT * WIDTH
    ROWS: tl.constexpr = BLOCK_N // BLOCK_X
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
    q = load_queries(q_ptr + unit_start(place, q_strides), y, x, real, q_strides, HEAD_DIM, BLOCK_D)
    k_ptr += unit_start(place, kv_strides)
    v_ptr += unit_start(place, kv_strides)
    rel_h_ptr += unit.to(tl.int64) * HEIGHT * TOKENS
    store_positions(rel_h_ptr, q, table_h_ptr, token, y, TOKENS, HEIGHT, HEAD_DIM, PRECISION, BLOCK_D, BLOCK_X, BLOCK_O)
    tl.debug_barrier()

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_x in range(0, WIDTH, BLOCK_X):
        columns = first_x + tl.arange(0, BLOCK_X)
        rel_w = positions(q, table_w_ptr, x, columns, WIDTH, HEAD_DIM, PRECISION, BLOCK_D, BLOCK_O)
        for first_y in range(0, HEIGHT, ROWS):
            key, value = load_keys_and_values(
                k_ptr, v_ptr, kv_strides, padding_ptr, first_y, first_x, place, heads, map_height, map_width,
                HEIGHT, WIDTH, HEAD_DIM, PADDED, BLOCK_N, BLOCK_X, BLOCK_D,
            )  # fmt: skip
            rel_h = load_positions(rel_h_ptr, first_y, token, HEIGHT, TOKENS, WHOLE, ROWS)
            t = scores(q, key, rel_w, SCALE, PRECISION)
            risen = tl.maximum(maximum, tl.max(tl.max(t, 2) + rel_h, 1))
            p = exponential(t - (risen[:, None] - rel_h)[:, :, None], EXACT)
            shrink = exponential(maximum - risen, EXACT)
            maximum = risen
            total = total * shrink + tl.sum(tl.sum(p, 1), 1)
            p = tl.reshape(p, (BLOCK_M, BLOCK_N)).to(value.dtype)
            out = tl.dot(p, value, out * shrink[:, None], input_precision=PRECISION)

    d = tl.arange(0, BLOCK_D)
    out_ptr += unit_start(place, out_strides)
    rows = out_ptr + y.to(tl.int64) * out_strides[2] + x.to(tl.int64) * out_strides[3]
    mask = real[:, None] & ((d < HEAD_DIM) | (HEAD_DIM == BLOCK_D))
    tl.store(rows[:, None] + d, out / total[:, None], mask=mask)
    sums_ptr += 2 * (statistics_start(place, heads, map_height, map_width) + y.to(tl.int64) * map_width + x)
    tl.store(sums_ptr, maximum, mask=real)
    tl.store(sums_ptr + 1, total, mask=real)
