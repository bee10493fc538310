"""Attention of token sequences in Triton, backward, without atomics: queries gather their gradient, then keys theirs.

With p the probabilities, computed again from the log of their denominators, and delta = rowsum(grad_out * out):
grad_v = p^T grad_out, grad_scores = p * (grad_out v^T - delta), grad_q = scale * grad_scores k and
grad_k = scale * grad_scores^T q; with rotary turns, q and k are rotated, and their gradients turned back. For queries,
masked blocks come first, as in the forward.
"""

import triton
import triton.language as tl

from .matrix_product import kept
from .rotary import turn
from .sequence_attention import (
    LOG2_E,
    columns,
    exponentials,
    load_queries,
    load_rows,
    load_turns,
    phases,
    scaled,
    sequence_bounds,
    split_halves,
    visible_keys,
)


@triton.jit
def _in_units(lse, WIDE: tl.constexpr):
    """As `exponentials` takes it."""
    return lse if WIDE else lse * LOG2_E


@triton.jit
def _store_gradient(
    grad, pointers, turns_ptr, start, end, behind, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad (BLOCK, BLOCK_D), turned back where there are rotary turns, to rows [start, end) of a head."""
    rows = start + tl.arange(0, BLOCK)
    pointers += rows.to(tl.int64)[:, None] * stride
    here = (rows < end)[:, None]
    if ROTARY:
        pairs = tl.arange(0, BLOCK_D // 2)
        first, second = split_halves(grad)
        cosines, sines = load_turns(turns_ptr, rows + behind, end + behind, HEAD_DIM, BLOCK_D)
        first, second = turn(first, second, cosines, -sines)
        here &= (pairs < HEAD_DIM // 2)[None, :]
        tl.store(pointers + pairs[None, :], first, mask=here)
        tl.store(pointers + HEAD_DIM // 2 + pairs[None, :], second, mask=here)
    else:
        cols, real = columns(HEAD_DIM, BLOCK_D, False)
        tl.store(pointers + cols[None, :], grad, mask=here & real[None, :])


@triton.jit
def _gather_queries(
    acc, q, grad_out, lse, delta, k_base, v_base, k_token, v_token, begin, end, first_keys, end_keys, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROTARY: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + grad_scores k over the blocks of keys from `begin` to `end`."""
    ALL_COLS: tl.constexpr = HEAD_DIM == BLOCK_D
    key_cols, real_key_cols = columns(HEAD_DIM, BLOCK_D, ROTARY)
    cols, real = columns(HEAD_DIM, BLOCK_D, False)
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_base, start, end, k_token, key_cols, real_key_cols, BLOCK_N, not MASKED, ALL_COLS)
        v = load_rows(v_base, start, end, v_token, cols, real, BLOCK_N, not MASKED, ALL_COLS)
        scores = tl.dot(kept(q, start, PRECISION), tl.trans(k), input_precision=PRECISION)
        p = exponentials(scores, lse[:, None], factor, q.dtype == tl.float32)
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            visible = keys[None, :] < end_keys[:, None]
            if PACKED:
                visible &= keys[None, :] >= first_keys[:, None]
            p = tl.where(visible, p, 0.0)
        grad_p = tl.dot(kept(grad_out, start, PRECISION), tl.trans(v), input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, turns_ptr, cu_seqlens_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    num_queries, num_keys, num_sequences, heads, group, factor, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    ROTARY: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q and delta of one block of queries of one head. q is not rotated and k is, as in the forward."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_base = q_ptr + batch * q_batch + head * q_head
    k_base = k_ptr + batch * k_batch + head // group * k_head
    v_base = v_ptr + batch * v_batch + head // group * v_head
    turns_base = turns_ptr
    if ROTARY:
        turns_base += batch * num_keys * HEAD_DIM
    behind, out_token = num_keys - num_queries, heads * HEAD_DIM
    out_base = (batch * num_queries * heads + head) * HEAD_DIM
    cols, real = columns(HEAD_DIM, BLOCK_D, False)
    rows = start + tl.arange(0, BLOCK_M)
    statistics = (batch * heads + head) * num_queries + rows

    out = load_rows(out_ptr + out_base, start, num_queries, out_token, cols, real, BLOCK_M, False, False)
    grad_out = load_rows(grad_out_ptr + out_base, start, num_queries, out_token, cols, real, BLOCK_M, False, False)
    # As the products with v are added up: a query that sees one key, whose out is that key's value, then gets no
    # gradient at all, as it should.
    products = tl.dot(grad_out, tl.trans(out), input_precision=PRECISION)
    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    delta = tl.sum(tl.where(diagonal, products, 0.0), 1)
    tl.store(delta_ptr + statistics, delta, mask=rows < num_queries)
    lse = tl.load(lse_ptr + statistics, mask=rows < num_queries, other=0.0)
    lse = _in_units(lse, q_ptr.dtype.element_ty == tl.float32)
    q = load_queries(q_base, q_token, turns_base, start, num_queries, behind, HEAD_DIM, BLOCK_D, ROTARY, BLOCK_M)
    q = scaled(q, factor, SIGN)

    first_keys, end_keys, begin, whole, partial, end = visible_keys(
        start, num_queries, num_keys, cu_seqlens_ptr, num_sequences, CAUSAL, PACKED, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if PACKED:
        acc = _gather_queries(
            acc, q, grad_out, lse, delta, k_base, v_base, k_token, v_token, begin, whole, first_keys, end_keys, factor,
            HEAD_DIM, BLOCK_D, BLOCK_N, ROTARY, True, PACKED, PRECISION,
        )  # fmt: skip
    acc = _gather_queries(
        acc, q, grad_out, lse, delta, k_base, v_base, k_token, v_token, partial, end, first_keys, end_keys, factor,
        HEAD_DIM, BLOCK_D, BLOCK_N, ROTARY, True, PACKED, PRECISION,
    )  # fmt: skip
    acc = _gather_queries(
        acc, q, grad_out, lse, delta, k_base, v_base, k_token, v_token, whole, partial, first_keys, end_keys, factor,
        HEAD_DIM, BLOCK_D, BLOCK_N, ROTARY, False, PACKED, PRECISION,
    )  # fmt: skip
    _store_gradient(
        acc * scale, grad_q_ptr + out_base, turns_base, start, num_queries, behind, out_token,
        HEAD_DIM, BLOCK_D, ROTARY, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _add_block(
    grad_k, grad_v, k, v, q_base, q_token, grad_out_base, grad_out_token, lse_base, delta_base,
    start, end, first_queries, end_queries, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k + grad_scores^T q and grad_v + p^T grad_out over the block of queries from `start`: those from `end` on
    are zero, and add nothing."""
    query_cols, real_query_cols = columns(HEAD_DIM, BLOCK_D, ROTARY)
    cols, real = columns(HEAD_DIM, BLOCK_D, False)
    ALL_COLS: tl.constexpr = HEAD_DIM == BLOCK_D
    q = load_rows(q_base, start, end, q_token, query_cols, real_query_cols, BLOCK_M, False, ALL_COLS)
    grad_out = load_rows(grad_out_base, start, end, grad_out_token, cols, real, BLOCK_M, False, ALL_COLS)
    queries = start + tl.arange(0, BLOCK_M)
    lse = _in_units(tl.load(lse_base + queries, mask=queries < end, other=0.0), q.dtype == tl.float32)
    delta = tl.load(delta_base + queries, mask=queries < end, other=0.0)
    if q.dtype == tl.float32:
        # The very scores of the forward, whose roundings are then those of the denominators too.
        scores = tl.trans(tl.dot(q * factor, tl.trans(kept(k, start, PRECISION)), input_precision=PRECISION))
    else:
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = exponentials(scores, lse[None, :], factor, q.dtype == tl.float32)
    if MASKED:
        visible = (queries[None, :] >= first_queries[:, None]) & (queries[None, :] < end_queries[:, None])
        p = tl.where(visible, p, 0.0)
    grad_v = tl.dot(p.to(q.dtype), grad_out, grad_v, input_precision=PRECISION)
    grad_p = tl.dot(kept(v, start, PRECISION), tl.trans(grad_out), input_precision=PRECISION)
    grad_scores = p * (grad_p - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def _gather_keys(
    grad_k, grad_v, k, v, q_base, q_token, grad_out_base, grad_out_token, lse_base, delta_base,
    begin, end, first_queries, end_queries, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_add_block` over the blocks of queries from `begin` to `end`."""
    for start in range(begin, end, BLOCK_M):
        grad_k, grad_v = _add_block(
            grad_k, grad_v, k, v, q_base, q_token, grad_out_base, grad_out_token, lse_base, delta_base,
            start, end, first_queries, end_queries, factor, HEAD_DIM, BLOCK_D, BLOCK_M, ROTARY, MASKED, PRECISION,
        )  # fmt: skip
    return grad_k, grad_v


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, turns_ptr, cu_seqlens_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    num_queries, num_keys, num_sequences, kv_heads, group, factor, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    ROTARY: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one block of keys of one head, from all the heads of queries that see it. q and k come
    rotated. The first blocks, which the most queries see, come first."""
    batch, head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    start = tl.program_id(1) * BLOCK_N
    turns_base = turns_ptr
    if ROTARY:
        turns_base += batch * num_keys * HEAD_DIM
    heads, key_token = kv_heads * group, kv_heads * HEAD_DIM
    key_cols, real_key_cols = columns(HEAD_DIM, BLOCK_D, ROTARY)
    cols, real = columns(HEAD_DIM, BLOCK_D, False)
    k_base, v_base = k_ptr + batch * k_batch + head * k_head, v_ptr + batch * v_batch + head * v_head
    k = load_rows(k_base, start, num_keys, k_token, key_cols, real_key_cols, BLOCK_N, False, False)
    v = load_rows(v_base, start, num_keys, v_token, cols, real, BLOCK_N, False, False)
    if SIGN != 1:
        k *= SIGN

    last, behind = tl.minimum(start + BLOCK_N, num_keys) - 1, num_keys - num_queries
    keys = tl.minimum(start + tl.arange(0, BLOCK_N), last)
    if PACKED:
        first, end, low_first, low_end, high_first, high_end = sequence_bounds(
            start, last, BLOCK_N, cu_seqlens_ptr, num_sequences
        )
    else:
        first, end = tl.zeros_like(keys), tl.zeros_like(keys) + num_queries
        low_first, low_end, high_first, high_end = 0, num_queries, 0, num_queries
    if CAUSAL:
        first = tl.maximum(keys - behind, 0)
        low_first, high_first = tl.maximum(start - behind, 0), tl.maximum(last - behind, 0)
    begin, whole, partial, stop = phases(low_first, low_end, high_first, high_end, BLOCK_M)

    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if GROUPED:
        # One loop over the blocks of all members, each of them masked: loops within a loop hold too many registers.
        blocks = tl.cdiv(stop - begin, BLOCK_M)
        for step in range(0, group * blocks):
            query_head = head * group + step // blocks
            statistics = (batch * heads + query_head) * num_queries
            grad_k, grad_v = _add_block(
                grad_k, grad_v, k, v, q_ptr + batch * q_batch + query_head * q_head, q_token,
                grad_out_ptr + (batch * num_queries * heads + query_head) * HEAD_DIM, heads * HEAD_DIM,
                lse_ptr + statistics, delta_ptr + statistics, begin + step % blocks * BLOCK_M, stop, first, end, factor,
                HEAD_DIM, BLOCK_D, BLOCK_M, ROTARY, PACKED or CAUSAL, PRECISION,
            )  # fmt: skip
    else:
        q_base = q_ptr + batch * q_batch + head * q_head
        grad_out_base = grad_out_ptr + (batch * num_queries * heads + head) * HEAD_DIM
        statistics = (batch * heads + head) * num_queries
        if PACKED or CAUSAL:
            grad_k, grad_v = _gather_keys(
                grad_k, grad_v, k, v, q_base, q_token, grad_out_base, heads * HEAD_DIM, lse_ptr + statistics,
                delta_ptr + statistics, begin, whole, first, end, factor,
                HEAD_DIM, BLOCK_D, BLOCK_M, ROTARY, True, PRECISION,
            )  # fmt: skip
        grad_k, grad_v = _gather_keys(
            grad_k, grad_v, k, v, q_base, q_token, grad_out_base, heads * HEAD_DIM, lse_ptr + statistics,
            delta_ptr + statistics, whole, partial if PACKED else stop, first, end, factor,
            HEAD_DIM, BLOCK_D, BLOCK_M, ROTARY, False, PRECISION,
        )  # fmt: skip
        if PACKED:
            grad_k, grad_v = _gather_keys(
                grad_k, grad_v, k, v, q_base, q_token, grad_out_base, heads * HEAD_DIM, lse_ptr + statistics,
                delta_ptr + statistics, partial, stop, first, end, factor,
                HEAD_DIM, BLOCK_D, BLOCK_M, ROTARY, True, PRECISION,
            )  # fmt: skip

    out_base = (batch * num_keys * kv_heads + head) * HEAD_DIM
    _store_gradient(
        grad_k * scale, grad_k_ptr + out_base, turns_base, start, num_keys, 0, key_token,
        HEAD_DIM, BLOCK_D, ROTARY, BLOCK_N,
    )  # fmt: skip
    _store_gradient(
        grad_v, grad_v_ptr + out_base, turns_base, start, num_keys, 0, key_token,
        HEAD_DIM, BLOCK_D, False, BLOCK_N,
    )  # fmt: skip
