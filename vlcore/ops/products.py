"""Matrix products of many rows on the CPU, by ours where they are faster than torch's."""

import torch
from torch import Tensor

from vlcore import native
from vlcore.ops.dispatch import known

# Of the instructions in csrc/kernels.h: those with which ours are faster in any dtype; and AMX, with which they are of
# whole tiles of bfloat16, and torch's are faster in float32, and where little is multiplied by what has to be packed or
# finished.
_DOTS, _TILES = 3, 4
_FEWEST_ROWS, _FEWEST_COLS, _LEAST_DEPTH = 256, 128, 384


def ours_are_faster(dtype: torch.dtype, rows: int, cols: int, depth: int) -> bool:
    """Whether ours are the faster ones for (rows, depth) times (depth, cols)."""
    if native.level == _TILES:
        is_large = known(rows >= _FEWEST_ROWS) and known(cols >= _FEWEST_COLS) and known(depth >= _LEAST_DEPTH)
        return dtype == torch.bfloat16 and is_large
    return native.level == _DOTS


def a_bt(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (M, N) = a (M, K) b (N, K)^T; all are contiguous."""
    if not _in_bfloat16(a, *out.shape, a.shape[1]):
        return torch.mm(a, b.t(), out=out)
    sizes = (*out.shape, a.shape[1])
    native.run_cpp("linear_blocked_forward", a.dtype, a, b, None, None, out, *sizes, out.shape[1], False)
    return out


def a_b(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (M, N) = a (M, K) b (K, N); all are contiguous."""
    if not _in_bfloat16(a, *out.shape, a.shape[1]):
        return torch.mm(a, b, out=out)
    native.run_cpp("linear_grad_x", a.dtype, a, b, out, *a.shape, b.shape[1])
    return out


def at_b(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (M, N) = a (K, M)^T b (K, N); all are contiguous."""
    if not _in_bfloat16(a, *out.shape, a.shape[0]):
        return torch.mm(a.t(), b, out=out)
    native.run_cpp("linear_grad_weight", a.dtype, a, b, out, *a.shape, b.shape[1])
    return out


def _in_bfloat16(a: Tensor, *sizes: int) -> bool:
    """Of products of many blocks, as the loss has them, those of float32 are torch's."""
    return a.dtype == torch.bfloat16 and ours_are_faster(a.dtype, *sizes)
