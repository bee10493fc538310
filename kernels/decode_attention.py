"""One step of decoding in Triton: blocks of cached keys go to programs of their own, whose sums are merged in order."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import direct_launch, launch
from .matrix_product import input_precision, operand_bits
from .rotary import cosines_and_sines, frequencies, log2_theta, turn


@triton.jit
def _block_kernel(
    q_ptr, k_ptr, v_ptr, key_cache_ptr, value_cache_ptr, lengths_ptr, sums_ptr, statistics_ptr,
    key_batch, key_token, key_head, value_batch, value_token, value_head, kv_heads, group, factor,
    log2_theta, log2_theta_rest,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys for all heads of queries that share them -> their weighted values, the highest score and the
    sum of weights. The program whose block the new token falls into appends it."""
    batch, head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    start = tl.program_id(1) * BLOCK_N
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    if start > length:
        return
    pairs, cols, members = tl.arange(0, HALF), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    real_pair, real_col = pairs < HEAD_DIM // 2, cols < HEAD_DIM
    keys = start + tl.arange(0, BLOCK_N)
    cached = keys < length
    # What comes from far is asked for first.
    key_rows = key_cache_ptr + batch * key_batch + head * key_head + keys.to(tl.int64)[:, None] * key_token
    value_rows = value_cache_ptr + batch * value_batch + head * value_head + keys.to(tl.int64)[:, None] * value_token
    here = cached[:, None] & real_pair[None, :]
    first_key = tl.load(key_rows + pairs[None, :], mask=here, other=0.0)
    second_key = tl.load(key_rows + HEAD_DIM // 2 + pairs[None, :], mask=here, other=0.0)
    values = tl.load(value_rows + cols[None, :], mask=cached[:, None] & real_col[None, :], other=0.0)

    row = batch * kv_heads + head
    q = q_ptr + (row * group + members)[:, None] * HEAD_DIM + pairs[None, :]
    here = (members < group)[:, None] & real_pair[None, :]
    first, second = tl.load(q, mask=here, other=0.0), tl.load(q + HEAD_DIM // 2, mask=here, other=0.0)
    k = k_ptr + row * HEAD_DIM + pairs
    first_new, second_new = tl.load(k, mask=real_pair, other=0.0), tl.load(k + HEAD_DIM // 2, mask=real_pair, other=0.0)
    value_new = tl.load(v_ptr + row * HEAD_DIM + cols, mask=real_col, other=0.0)
    dtype: tl.constexpr = first.dtype
    cosines, sines = cosines_and_sines(length, frequencies(pairs, log2_theta, log2_theta_rest, HEAD_DIM))
    first, second = turn(first.to(tl.float32), second.to(tl.float32), cosines[None, :], sines[None, :])
    first, second = first.to(dtype), second.to(dtype)
    first_new, second_new = turn(first_new.to(tl.float32), second_new.to(tl.float32), cosines, sines)
    first_new, second_new = first_new.to(dtype), second_new.to(dtype)

    scores = tl.dot(first, tl.trans(first_key), input_precision=PRECISION)
    scores = tl.dot(second, tl.trans(second_key), scores, input_precision=PRECISION) * factor
    scores = tl.where(cached[None, :], scores, float("-inf"))
    peak = tl.max(scores, 1)
    appends = length < start + BLOCK_N
    products = first.to(tl.float32) * first_new.to(tl.float32)[None, :]
    products += second.to(tl.float32) * second_new.to(tl.float32)[None, :]
    score_new = tl.where(appends, tl.sum(products, 1) * factor, float("-inf"))
    peak = tl.maximum(peak, score_new)
    weight_new = tl.exp2(score_new - peak)
    weights = tl.exp2(scores - peak[:, None])
    sums = tl.dot(weights.to(dtype), values, input_precision=PRECISION)
    sums += weight_new[:, None] * value_new.to(tl.float32)[None, :]

    place = (row * group + members) * tl.num_programs(1) + tl.program_id(1)
    tl.store(statistics_ptr + 2 * place, peak, mask=members < group)
    tl.store(statistics_ptr + 2 * place + 1, tl.sum(weights, 1) + weight_new, mask=members < group)
    here = (members < group)[:, None] & real_col[None, :]
    tl.store(sums_ptr + place[:, None] * HEAD_DIM + cols[None, :], sums, mask=here)
    if appends:
        key = key_cache_ptr + batch * key_batch + head * key_head + length.to(tl.int64) * key_token
        value = value_cache_ptr + batch * value_batch + head * value_head + length.to(tl.int64) * value_token
        tl.store(key + pairs, first_new, mask=real_pair)
        tl.store(key + HEAD_DIM // 2 + pairs, second_new, mask=real_pair)
        tl.store(value + cols, value_new, mask=real_col)


@triton.jit
def _merge_kernel(
    sums_ptr, statistics_ptr, lengths_ptr, out_ptr, heads, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of one head: the sums of its blocks, BLOCK_S at a time."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = (tl.load(lengths_ptr + row // heads) // BLOCK_N + 1).to(tl.int32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    total, peak = 0.0, -3e38
    for start in range(0, used, BLOCK_S):
        block = start + tl.arange(0, BLOCK_S)
        place = row * blocks + block
        peaks = tl.load(statistics_ptr + 2 * place, mask=block < used, other=float("-inf"))
        totals = tl.load(statistics_ptr + 2 * place + 1, mask=block < used, other=0.0)
        here = (block < used)[:, None] & (cols < HEAD_DIM)[None, :]
        sums = tl.load(sums_ptr + place[:, None] * HEAD_DIM + cols[None, :], mask=here, other=0.0)
        highest = tl.maximum(peak, tl.max(peaks, 0))
        weights, shrink = tl.exp2(peaks - highest), tl.exp2(peak - highest)
        total = total * shrink + tl.sum(weights * totals, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * sums, 0)
        peak = highest
    tl.store(out_ptr + row * HEAD_DIM + cols, acc / total, mask=cols < HEAD_DIM)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    theta: float,
    scale: float,
) -> Tensor:
    """q (B, 1, Hq, D), k, v (B, 1, Hkv, D), caches (B, S, Hkv, D), lengths (B,) -> (B, 1, Hq, D); k and v appended."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    if not out.numel():
        return out
    (batch, _, heads, dim), (_, size, kv_heads, _) = q.shape, key_cache.shape
    how, merge = _settings(q.dtype, input_precision(q.dtype), q.device, heads // kv_heads, dim)
    blocks = launch.ceil_div(size, how["BLOCK_N"])
    sums = q.new_empty((batch * heads * blocks * (dim + 2),), dtype=torch.float32)
    statistics = sums[batch * heads * blocks * dim :]
    tensors = q, k, v, key_cache, value_cache, lengths, sums, statistics
    strides = *key_cache.stride()[:3], *value_cache.stride()[:3]
    numbers = *strides, kv_heads, heads // kv_heads, scale * math.log2(math.e), *log2_theta(theta)
    direct_launch.run(_block_kernel, (batch * kv_heads, blocks), tensors, numbers, how)
    grid = batch * heads, launch.ceil_div(dim, merge["BLOCK_D"])
    direct_launch.run(_merge_kernel, grid, (sums, statistics, lengths, out), (heads, blocks), merge)
    return out


@cache
def _settings(dtype: torch.dtype, precision: str, device: torch.device, group: int, dim: int) -> tuple[dict, dict]:
    """What both kernels are compiled for, and how they are launched. Not to be changed."""
    constants = {
        "HEAD_DIM": dim,
        "HALF": max(launch.next_power_of_2(dim // 2), 16),
        "BLOCK_D": max(launch.next_power_of_2(dim), 16),
        "BLOCK_G": max(launch.next_power_of_2(group), 16),
        "PRECISION": precision,
    }
    how = launch.settings("decode_attention", "block", device, bits=operand_bits(dtype, precision))
    merge = launch.settings("decode_attention", "merge", device)
    return constants | how, {"HEAD_DIM": dim, "BLOCK_N": how["BLOCK_N"]} | merge
