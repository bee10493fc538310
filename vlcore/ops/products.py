"""Matrix products of many rows on the CPU, by ours where they are faster than torch's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native

# The instructions of csrc/kernels.h from which ours are faster. From those for AMX on they are of whole tiles of
# bfloat16, and the packing of the second matrix takes so many rows to pay.
_LEVEL = 3
_TILE_LEVEL = 4
_TILE_ROWS = 256


def ours_are_faster(dtype: torch.dtype, rows: int) -> bool:
    """Whether ours are the faster ones for so many rows of the first matrix."""
    if native.level == _TILE_LEVEL:
        return dtype == torch.bfloat16 and rows >= _TILE_ROWS
    return native.level == _LEVEL


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K)^T, plus bias: (..., N)."""
    rows = native.rows(x)[0]
    if not ours_are_faster(x.dtype, rows):
        return F.linear(x, weight, bias)
    y = native.fresh(x.new_empty(*x.shape[:-1], weight.shape[0]))
    given = (x.contiguous(), weight, bias, None, y)
    native.run_cpp("linear_blocked_forward", x.dtype, *given, rows, *weight.shape, weight.shape[0], False)
    return y


def a_bt(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (M, N) = a (M, K) b (N, K)^T; all are contiguous."""
    if not ours_are_faster(a.dtype, a.shape[0]):
        return torch.mm(a, b.t(), out=out)
    sizes = (*out.shape, a.shape[1])
    native.run_cpp("linear_blocked_forward", a.dtype, a, b, None, None, out, *sizes, out.shape[1], False)
    return out


def a_b(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (M, N) = a (M, K) b (K, N); all are contiguous."""
    if not ours_are_faster(a.dtype, a.shape[0]):
        return torch.mm(a, b, out=out)
    native.run_cpp("linear_grad_x", a.dtype, a, b, out, *a.shape, b.shape[1])
    return out


def at_b(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (M, N) = a (K, M)^T b (K, N); all are contiguous."""
    if not ours_are_faster(a.dtype, a.shape[1]):
        return torch.mm(a.t(), b, out=out)
    native.run_cpp("linear_grad_weight", a.dtype, a, b, out, *a.shape, b.shape[1])
    return out
