"""Rotary positions and softmax attention: softmax(rope(q) rope(k)^T * scale) v, causal, grouped, packed."""

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.apply_rope import apply_rope, check_positions, rope_tables, rotate
from vlcore.ops.attention import (
    AGAIN,
    attention_reference,
    check,
    cpp_backward,
    cpp_forward,
    cpp_refusals,
    fake_backward,
    fake_forward,
    may_split,
    sequence_lengths,
    triton_bounds,
    triton_refusals,
)
from vlcore.ops.dispatch import (
    AUTO,
    TORCH,
    Kernel,
    apply,
    choose,
    define,
    gradients,
    once_differentiable,
    remembered,
    statistics,
)


def rope_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float = 1e4,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, which every kernel is tested against."""
    cos, sin = rope_tables(positions, q.shape[-1], theta, torch.promote_types(q.dtype, torch.float32))
    first = positions.shape[1] - q.shape[1]
    q, k = rotate(q, cos[:, first:], sin[:, first:]), rotate(k, cos, sin)
    return attention_reference(q, k, v, causal, cu_seqlens, scale, "rope_attention")


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    theta: float = 1e4,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Rotate q and k by their positions (half-split, LLaMA's way) and attend.

    Args:
        q: (B, Tq, Hq, D), float32, float16 or bfloat16; float64 on "torch". D is even.
        k, v: (B, Tk, Hkv, D), of q's dtype, Tk >= Tq; Hq is a multiple of Hkv, and query head h reads key head
            h // (Hq / Hkv).
        positions: (B, Tk), int32 or int64, of the keys; the queries stand at the last Tq of them.
        theta: base of the rotary wavelengths.
        causal: query i sees key j when j <= i + Tk - Tq.
        cu_seqlens: (num_sequences + 1,) int32, from 0 to Tk: packs several sequences into B = 1, Tq = Tk, and
            attention never crosses them; but "triton" multiplies by 0 what is masked, so that NaN and infinities may
            reach the next sequence. Its values are checked where they are on the CPU.
        scale: of the scores; D^-1/2 unless given.
        backend: "auto", "torch", "triton", "cpp", or "xformers", a package that "auto" does not look for.

    Returns:
        (B, Tq, Hq, D), of q's dtype. The rotation and the softmax are computed in float32. Under torch.autocast q, k
        and v are cast to its dtype.

    Raises:
        ValueError: shapes, dtypes, devices or sequence bounds that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(q):
        options = {"theta": theta, "causal": causal, "cu_seqlens": cu_seqlens, "scale": scale, "backend": backend}
        return autocast.run(rope_attention, autocast.low(q), q, k, v, positions, **options)
    backend = _chosen(q, k, v, positions, theta, causal, cu_seqlens, scale, backend)
    scale = checks.scale(scale, q)
    if backend == TORCH and may_split(cu_seqlens):
        return rope_attention_reference(q, k, v, positions, theta, causal, cu_seqlens, scale)
    return apply(RopeAttention, q, k, v, positions, cu_seqlens, (theta, causal, scale, backend))


@remembered
def _chosen(q, k, v, positions, theta, causal, cu_seqlens, scale, backend) -> str:
    check("rope_attention", q, k, v, cu_seqlens)
    check_positions("rope_attention", positions, "k", k)
    checks.number("rope_attention", "theta", theta)
    checks.flag("rope_attention", "causal", causal)
    scale = checks.checked_scale("rope_attention", scale, q)
    return choose("rope_attention", KERNELS, backend, q, k, v, positions, theta, causal, cu_seqlens, scale)


class RopeAttention(torch.autograd.Function):
    """`rope_attention` through its torch ops; lse is the logarithm of each softmax's denominator, (B, Hq, Tq)."""

    @staticmethod
    def forward(ctx, q, k, v, positions, cu_seqlens, numbers):
        out, lse = rope_attention_forward(q, k, v, positions, cu_seqlens, *numbers)
        ctx.save_for_backward(q, k, v, positions, cu_seqlens, out, lse)
        ctx.numbers = numbers
        return out

    @staticmethod
    @partial(once_differentiable, instead=AGAIN)
    def backward(ctx, grad_out):
        grads = rope_attention_backward(grad_out, *ctx.saved_tensors, *ctx.numbers)
        return *grads, None, None, None


def _cpp_refusals(q, k, v, positions, theta, causal, cu_seqlens, scale) -> list[str]:
    return cpp_refusals(q, k, v, causal, cu_seqlens, scale)


def _cpp_forward(q, k, v, positions, cu_seqlens, theta, causal, scale) -> tuple[Tensor, Tensor]:
    return cpp_forward(q, k, v, cu_seqlens, causal, scale, positions, theta, "rope_attention")


def _cpp_backward(grad_out, q, k, v, positions, cu_seqlens, out, lse, theta, causal, scale) -> tuple[Tensor, ...]:
    given = (grad_out, q, k, v, cu_seqlens, out, lse, causal, scale)
    return cpp_backward(*given, positions, theta, "rope_attention")


def _triton_refusals(q, k, v, positions, theta, causal, cu_seqlens, scale) -> list[str]:
    return triton_refusals(q, k, v, causal, cu_seqlens, scale)


_launch_forward, _launch_backward = (native.triton("rope_attention", name) for name in ("forward", "backward"))


def _triton_forward(q, k, v, positions, cu_seqlens, *numbers) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, v, positions, triton_bounds("rope_attention", cu_seqlens, q), *numbers)


def _triton_backward(grad_out, q, k, v, positions, cu_seqlens, out, lse, *numbers) -> tuple[Tensor, ...]:
    bounds = triton_bounds("rope_attention", cu_seqlens, q)
    return _launch_backward(grad_out, q, k, v, positions, bounds, out, lse, *numbers)


def _attend_with_xformers(q, k, v, positions, cu_seqlens, theta, causal, scale) -> Tensor:
    """Rotated by the kernel that is best at it, and attended to by memory_efficient_attention."""
    from xformers.ops import fmha

    (batch, num_queries, heads, head_dim), (num_keys, kv_heads) = q.shape, k.shape[1:3]
    q = apply_rope(q, positions[:, num_keys - num_queries :], theta)
    k = apply_rope(k, positions, theta)
    bias = None
    if cu_seqlens is not None:
        lengths = sequence_lengths("rope_attention", cu_seqlens, num_queries)
        bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens([length for length in lengths if length])
        bias = bias.make_causal() if causal else bias
    elif causal and num_queries == num_keys:
        bias = fmha.attn_bias.LowerTriangularMask()
    elif causal:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    if heads != kv_heads:
        # Groups are a dimension of their own, along which keys and values are the same.
        q = q.unflatten(2, (kv_heads, -1))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, heads // kv_heads, -1) for x in (k, v))
    out = fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    return out.reshape(batch, num_queries, heads, head_dim)


def _xformers_forward(q, *others) -> tuple[Tensor, Tensor]:
    return _attend_with_xformers(q, *others).contiguous(), statistics(q, (), TORCH)


def _xformers_backward(grad_out, q, k, v, positions, cu_seqlens, out, lse, *numbers) -> tuple[Tensor, ...]:
    """By running the forward again: what xformers keeps for its own backward differs from kernel to kernel."""
    return gradients(
        lambda q, k, v: _attend_with_xformers(q, k, v, positions, cu_seqlens, *numbers), (q, k, v), grad_out
    )


def _xformers_refusals(q, k, v, positions, theta, causal, cu_seqlens, scale) -> list[str]:
    reasons = {
        "xformers is not installed": find_spec("xformers") is None,
        "xformers attends on a GPU only": not q.is_cuda,
        "xformers computes in no float64": q.dtype == torch.float64,
        "xformers takes no empty tensors": not q.numel(),
    }
    return [reason for reason, applies in reasons.items() if applies]


# In order of preference. Whether FlashAttention (torch's SDPA behind apply_rope, or xformers) does causal heads of 128
# better on a GPU is not measured yet: where it does, `worthwhile` says so and "auto" takes it.
KERNELS = {
    "triton": Kernel(_triton_forward, _triton_backward, _triton_refusals, launch.worthwhile),
    "cpp": Kernel(_cpp_forward, _cpp_backward, _cpp_refusals),
    "xformers": Kernel(_xformers_forward, _xformers_backward, _xformers_refusals, lambda *arguments: False),
}


def _torch_forward(q, k, v, positions, cu_seqlens, theta, causal, scale):
    out = rope_attention_reference(q, k, v, positions, theta, causal, cu_seqlens, scale)
    return out.contiguous(), statistics(q, (), TORCH)


def _torch_backward(grad_out, q, k, v, positions, cu_seqlens, out, lse, theta, causal, scale):
    return gradients(
        lambda q, k, v: rope_attention_reference(q, k, v, positions, theta, causal, cu_seqlens, scale),
        (q, k, v),
        grad_out,
    )


def _fake_forward(*arguments):
    *given, backend = arguments
    return fake_forward(*given, TORCH if backend == "xformers" else backend)


rope_attention_forward = define(
    "rope_attention_forward(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor? cu_seqlens, float theta,"
    " bool causal, float scale, str backend) -> (Tensor out, Tensor lse)",
    KERNELS,
    _torch_forward,
    fake=_fake_forward,
)
rope_attention_backward = define(
    "rope_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor positions, Tensor? cu_seqlens,"
    " Tensor out, Tensor lse, float theta, bool causal, float scale, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    KERNELS,
    _torch_backward,
    fake=fake_backward,
)
