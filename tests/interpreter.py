"""Triton's interpreter, taught to compute in bfloat16, to leave no traces and to count with today's numpy. It holds
bfloat16 as 16-bit integers: left to itself it truncates where a GPU rounds, and adds and multiplies the integers."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vlcore.kernels import launch


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 numbers nearest to these; of two that are as near, of the even one."""
    bits = numbers.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, nearest).astype(np.uint16)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _rounded(handle: TensorHandle) -> TensorHandle:
    # What compares numbers gives truths, whatever their dtype.
    return handle if handle.data.dtype == np.bool_ else TensorHandle(rounded(handle.data), tl.bfloat16)


def teach_bfloat16() -> None:
    """From now on the interpreter casts, adds, compares and multiplies bfloat16 as a GPU does, and has constants of it,
    which Triton's lacks in 3.6; launchers are told."""
    builder = InterpreterBuilder
    cast, convert = builder.cast_impl, builder.create_fp_to_fp
    one, two, dot = builder.unary_op, builder.binary_op, builder.create_dot

    def cast_impl(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return cast(self, _widened(src), dst_type)
        return src if _is_bfloat16(src) else TensorHandle(rounded(src.data), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bfloat16(src) or dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def unary_op(self, arg, op):
        return _rounded(one(self, _widened(arg), op)) if _is_bfloat16(arg) else one(self, arg, op)

    def binary_op(self, lhs, rhs, op):
        if not _is_bfloat16(lhs):
            return two(self, lhs, rhs, op)
        return _rounded(two(self, _widened(lhs), _widened(rhs), op))

    def create_dot(self, a, b, d, *how):
        return dot(self, _widened(a), _widened(b), d, *how)

    def get_bf16(self, value):
        return cast_impl(self, self.get_fp32(value), tl.bfloat16)

    for method in (cast_impl, create_fp_to_fp, unary_op, binary_op, create_dot, get_bf16):
        setattr(builder, method.__name__, method)
    launch.BFLOAT16_INTERPRETED = True


def count_with_numpy() -> None:
    """From now on a number that a kernel has loaded or computed may bound its loops: it is an array of one, which since
    numpy 2.5 is no int by itself, as Triton 3.6 still takes it for."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def patch_once() -> None:
    """From now on the interpreter patches Triton's language once a launch, and undoes all of it.

    By itself it does so again for every function that a kernel calls, which takes most of its time, and leaves those
    patches behind, with which nothing can be compiled any more."""
    patch, launch_scope, patched = interpreter._patch_lang, interpreter._LangPatchScope(), set()

    def patch_lang(fn):
        nonlocal launch_scope, patched
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not launch_scope._changes:
            launch_scope, patched = patch(fn), modules
        elif not modules <= patched:
            # Undone before what was patched earlier, as the last of it.
            launch_scope._changes += patch(fn)._changes
            patched |= modules
        return launch_scope

    interpreter._patch_lang = patch_lang
