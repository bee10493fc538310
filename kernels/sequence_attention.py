"""Attention of token sequences in Triton, forward: out = softmax(q k^T * scale) v, and the log of its denominators.

Every query sees a range of keys, [first, end): causal, packed or neither only says which. A program has BLOCK_M
queries of one head and goes over the keys that any of them sees: first blocks that not all see, then those that all
do and that need no mask. In the other order ptxas cannot tell what Hopper's products (wgmma) of the one loop leave to
the next, and lets each wait for the one before.

Where there are rotary turns, keys come rotated and queries do not; a head's columns are then its two halves, each
padded to a power of two.
"""

import math

import triton
import triton.language as tl

from .matrix_product import kept
from .rotary import turn

# Below any score, and finite: nothing is subtracted from infinity where a block holds no key that a query sees.
LOWEST = tl.constexpr(-3e38)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def columns(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Where the BLOCK_D columns of a head stand in memory, and which of them are real."""
    block = tl.arange(0, BLOCK_D)
    if HALVES and HEAD_DIM != BLOCK_D:
        half: tl.constexpr = HEAD_DIM // 2
        pair = block % (BLOCK_D // 2)
        return block // (BLOCK_D // 2) * half + pair, pair < half
    return block, block < HEAD_DIM


@triton.jit
def load_rows(base, start, end, stride, cols, real, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_COLS: tl.constexpr):
    """ROWS rows of a head from row `start`, zero from row `end` on and in columns that are not real."""
    rows = tl.arange(0, ROWS)
    # Offsets within a block fit in 32 bits, and cost half the registers.
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    here = (rows < end - start)[:, None]
    if ALL_ROWS and ALL_COLS:
        x = tl.load(pointers)
    elif ALL_ROWS:
        x = tl.load(pointers, mask=real[None, :], other=0.0)
    elif ALL_COLS:
        x = tl.load(pointers, mask=here, other=0.0)
    else:
        x = tl.load(pointers, mask=here & real[None, :], other=0.0)
    return x


@triton.jit
def sequence_bounds(start, last, BLOCK: tl.constexpr, cu_seqlens_ptr, num_sequences):
    """The first token and the end of the sequence of each of BLOCK tokens, which are start, start + 1, ..., last, last;
    then both for `start` alone, and for `last`.

    They are searched for by scalars: loops whose bounds come from the reduction of a block are not pipelined.
    """
    low, high = 0, num_sequences - 1
    while low < high:
        middle = (low + high) // 2
        ended = tl.load(cu_seqlens_ptr + middle + 1) <= start
        low, high = tl.where(ended, middle + 1, low), tl.where(ended, high, middle)
    low_first, low_end = tl.load(cu_seqlens_ptr + low), tl.load(cu_seqlens_ptr + low + 1)
    tokens = tl.minimum(start + tl.arange(0, BLOCK), last)
    first, end = tl.zeros_like(tokens) + low_first, tl.zeros_like(tokens) + low_end
    high_first, high_end = low_first, low_end
    # Bounds that end early are an error that is not looked for on a GPU; nothing outside of them is read.
    while (high_end <= last) & (low < num_sequences - 1):
        low += 1
        high_first, high_end = high_end, tl.load(cu_seqlens_ptr + low + 1)
        first, end = tl.where(tokens >= high_first, high_first, first), tl.where(tokens >= high_first, high_end, end)
    return first, end, low_first, low_end, high_first, high_end


@triton.jit
def phases(low_first, low_end, high_first, high_end, BLOCK: tl.constexpr):
    """Of ranges [first, end) that rise from a lowest to a highest: where the union begins, where blocks begin and cease
    that are in all of them, and where the union ends."""
    whole = low_first + tl.cdiv(high_first - low_first, BLOCK) * BLOCK
    partial = whole + tl.maximum(low_end - whole, 0) // BLOCK * BLOCK
    return low_first, tl.minimum(whole, high_end), tl.minimum(partial, high_end), high_end


@triton.jit
def visible_keys(
    start, num_queries, num_keys, cu_seqlens_ptr, num_sequences,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys [first, end) that each of BLOCK_M queries sees, those past the last as the last; and `phases`."""
    last, behind = tl.minimum(start + BLOCK_M, num_queries) - 1, num_keys - num_queries
    queries = tl.minimum(start + tl.arange(0, BLOCK_M), last)
    if PACKED:
        first, end, low_first, low_end, high_first, high_end = sequence_bounds(
            start, last, BLOCK_M, cu_seqlens_ptr, num_sequences
        )
    else:
        first, end = tl.zeros_like(queries), tl.zeros_like(queries) + num_keys
        low_first, low_end, high_first, high_end = 0, num_keys, 0, num_keys
    if CAUSAL:
        end, low_end, high_end = queries + behind + 1, start + behind + 1, last + behind + 1
    begin, whole, partial, stop = phases(low_first, low_end, high_first, high_end, BLOCK_N)
    return first, end, begin, whole, partial, stop


@triton.jit
def join_halves(first, second):
    """Two (M, D / 2) -> (M, D)."""
    both = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(both, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def split_halves(x):
    """(M, D) -> two (M, D / 2)."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def load_turns(turns_ptr, tokens, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines of tokens, each (tokens, BLOCK_D / 2)."""
    pairs = tl.arange(0, BLOCK_D // 2)
    pointers = turns_ptr + tokens.to(tl.int64)[:, None] * HEAD_DIM + pairs[None, :]
    inside = (tokens < end)[:, None] & (pairs < HEAD_DIM // 2)[None, :]
    return tl.load(pointers, mask=inside, other=0.0), tl.load(pointers + HEAD_DIM // 2, mask=inside, other=0.0)


@triton.jit
def load_queries(
    q_base, q_token, turns_ptr, start, num_queries, behind,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Queries of a head, turned where there are rotary turns, in the dtype that they come in."""
    ALL_COLS: tl.constexpr = HEAD_DIM == BLOCK_D
    if not ROTARY:
        cols, real = columns(HEAD_DIM, BLOCK_D, False)
        q = load_rows(q_base, start, num_queries, q_token, cols, real, BLOCK_M, False, ALL_COLS)
    else:
        pairs = tl.arange(0, BLOCK_D // 2)
        real = pairs < HEAD_DIM // 2
        first = load_rows(q_base, start, num_queries, q_token, pairs, real, BLOCK_M, False, ALL_COLS)
        second = load_rows(q_base + HEAD_DIM // 2, start, num_queries, q_token, pairs, real, BLOCK_M, False, ALL_COLS)
        tokens = start + behind + tl.arange(0, BLOCK_M)
        cosines, sines = load_turns(turns_ptr, tokens, num_queries + behind, HEAD_DIM, BLOCK_D)
        dtype: tl.constexpr = first.dtype
        first, second = turn(first.to(tl.float32), second.to(tl.float32), cosines, sines)
        q = join_halves(first.to(dtype), second.to(dtype))
    return q


@triton.jit
def scaled(x, factor, SIGN: tl.constexpr):
    """What goes into the operand of the scores: all of the scale in float32, elsewhere its sign, which is exact."""
    if x.dtype == tl.float32:
        x *= factor
    elif SIGN != 1:
        x *= SIGN
    return x


@triton.jit
def exponentials(scores, shift, factor, WIDE: tl.constexpr):
    """e^(scaled scores - shift): in float32 in natural units, which round less, elsewhere in powers of two."""
    return tl.exp(scores - shift) if WIDE else tl.exp2(scores * factor - shift)


@triton.jit
def _attend(
    acc, total, peak, q, k_base, v_base, k_token, v_token, begin, end, first_keys, end_keys, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROTARY: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `begin` to `end` -> acc, total, peak with them added."""
    WIDE: tl.constexpr = q.dtype == tl.float32
    ALL_COLS: tl.constexpr = HEAD_DIM == BLOCK_D
    key_cols, real_key_cols = columns(HEAD_DIM, BLOCK_D, ROTARY)
    value_cols, real_value_cols = columns(HEAD_DIM, BLOCK_D, False)
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_base, start, end, k_token, key_cols, real_key_cols, BLOCK_N, not MASKED, ALL_COLS)
        v = load_rows(
            v_base, start, end, v_token, value_cols, real_value_cols, BLOCK_N, not MASKED, HEAD_DIM == BLOCK_D
        )
        scores = tl.dot(kept(q, start, PRECISION), tl.trans(k), input_precision=PRECISION)
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            visible = keys[None, :] < end_keys[:, None]
            if PACKED:
                visible &= keys[None, :] >= first_keys[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        highest = tl.max(scores, 1)
        peak_here = tl.maximum(peak, highest if WIDE else highest * factor)
        p = exponentials(scores, peak_here[:, None], factor, WIDE)
        shrink = exponentials(peak, peak_here, 1.0, WIDE)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        peak = peak_here
    return acc, total, peak


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, turns_ptr, cu_seqlens_ptr, out_ptr, lse_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    num_queries, num_keys, num_sequences, heads, group, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    ROTARY: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; the last blocks, which see the most keys, come first."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_base = q_ptr + batch * q_batch + head * q_head
    k_base = k_ptr + batch * k_batch + head // group * k_head
    v_base = v_ptr + batch * v_batch + head // group * v_head
    turns_base = turns_ptr
    if ROTARY:
        turns_base += batch * num_keys * HEAD_DIM

    behind = num_keys - num_queries
    q = load_queries(q_base, q_token, turns_base, start, num_queries, behind, HEAD_DIM, BLOCK_D, ROTARY, BLOCK_M)
    q = scaled(q, factor, SIGN)
    first_keys, end_keys, begin, whole, partial, end = visible_keys(
        start, num_queries, num_keys, cu_seqlens_ptr, num_sequences, CAUSAL, PACKED, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    if PACKED:
        acc, total, peak = _attend(
            acc, total, peak, q, k_base, v_base, k_token, v_token, begin, whole, first_keys, end_keys,
            factor, HEAD_DIM, BLOCK_D, BLOCK_N, ROTARY, True, PACKED, PRECISION,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_base, v_base, k_token, v_token, partial, end, first_keys, end_keys,
        factor, HEAD_DIM, BLOCK_D, BLOCK_N, ROTARY, True, PACKED, PRECISION,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_base, v_base, k_token, v_token, whole, partial, first_keys, end_keys,
        factor, HEAD_DIM, BLOCK_D, BLOCK_N, ROTARY, False, PACKED, PRECISION,
    )  # fmt: skip

    queries = start + tl.arange(0, BLOCK_M)
    row = (batch * heads + head) * num_queries + queries
    lse = peak + tl.log(total) if q.dtype == tl.float32 else (peak + tl.log2(total)) / LOG2_E
    tl.store(lse_ptr + row, lse, mask=queries < num_queries)
    cols, real = columns(HEAD_DIM, BLOCK_D, False)
    row = (batch * num_queries + queries) * heads + head
    out = out_ptr + row[:, None] * HEAD_DIM + cols[None, :]
    tl.store(out, acc / total[:, None], mask=(queries < num_queries)[:, None] & real[None, :])
