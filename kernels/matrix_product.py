"""A tile of a matrix product, and the order of tiles: Triton device code that kernels of several operators share."""

import torch
import triton
import triton.language as tl


def input_precision(dtype: torch.dtype) -> str:
    """How operands are multiplied: as they are, unless they are float32 and torch's own switch allows TF32."""
    # Asked for allow_tf32, torch raises once its newer switch has been used; this one knows both.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def operand_bits(dtype: torch.dtype, precision: str) -> int:
    """Of what is multiplied, by which launch tables choose: 19 in TF32."""
    return 19 if precision == "tf32" else 8 * dtype.itemsize


@triton.jit
def tile_at(place, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """Row and column of the tile at a place of the order: GROUP rows of tiles are finished before the next, so that
    those computed at the same time find one another's operands in the L2 cache."""
    group = place // (GROUP * num_col_tiles)
    within = place % (GROUP * num_col_tiles)
    num_rows = tl.minimum(num_row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % num_rows, within // num_rows


@triton.jit
def product(
    a_ptr,
    b_ptr,
    rows,
    cols,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows and columns (both 1-D, int64) of A (M, K) B (K, N), summed in float32; what lies outside is 0."""
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth[None, :] * stride_ak
    b_ptrs = b_ptr + depth[:, None] * stride_bk + cols[None, :] * stride_bn
    in_rows, in_cols = rows[:, None] < M, cols[None, :] < N
    sums = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = depth < K - start
        a = tl.load(a_ptrs, mask=in_rows & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & in_cols, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    return sums


@triton.jit
def indices(tile, BLOCK: tl.constexpr):
    """Of the rows or columns of a tile."""
    return tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def store_tile(y_ptr, y, rows, cols, M, N, stride):
    """Write a tile of a row-major matrix (M, N) whose rows are `stride` apart."""
    tl.store(y_ptr + rows[:, None] * stride + cols[None, :], y, mask=(rows[:, None] < M) & (cols[None, :] < N))


@triton.jit
def kept(x, start, PRECISION: tl.constexpr):
    """x, an operand of every turn of a loop over `start`, which is not negative. A compiler that knew it to be the same
    in all would load it before the loop: a row of float32, multiplied without tensor cores, fills the registers."""
    return tl.where(start >= 0, x, 0.0) if x.dtype == tl.float32 and PRECISION == "ieee" else x
