"""Rotary positions and softmax attention: softmax(rope(q) rope(k)^T * scale) v, causal, grouped, packed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore.ops import checks
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, apply, choose, define, gradients, once_differentiable, statistics


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions (B, T), both (B, T, 1, head_dim / 2): angle i is position * theta^(-2i / D)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    angles = positions[..., None, None].to(dtype) * (1.0 / theta ** (pairs / head_dim))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, H, D) by its angle, in the dtype of the tables; x's dtype back."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def apply_rope(x: Tensor, positions: Tensor, theta: float = 1e4) -> Tensor:
    """Rotary position embedding the way of LLaMA: the two halves of a head are the pairs (arXiv 2104.09864).

    Args:
        x: (B, T, H, D), floating, D even.
        positions: (B, T), int32 or int64.
        theta: base of the wavelengths.

    Returns:
        (B, T, H, D), of x's dtype; computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    checks.rank("apply_rope", "x", x, "B T H D")
    checks.alike("apply_rope", x=x)
    _check_positions("apply_rope", positions, "x", x)
    return rotate(x, *rope_tables(positions, x.shape[-1], theta, torch.promote_types(x.dtype, torch.float32)))


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
    num_queries = q.shape[1]
    cos, sin = rope_tables(positions, q.shape[-1], theta, torch.promote_types(q.dtype, torch.float32))
    first = positions.shape[1] - num_queries
    q, k = rotate(q, cos[:, first:], sin[:, first:]), rotate(k, cos, sin)
    if cu_seqlens is None:
        return _attend(q, k, v, causal, scale)
    return _attend_packed(q, k, v, causal, scale, _sequence_lengths(cu_seqlens, num_queries))


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale) v on (B, T, H, D); the last query stands at the last key."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if causal and num_queries < num_keys:
        causal = False
        if num_queries > 1:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
            mask = ones.tril(num_keys - num_queries)
    # Comparing sizes that are symbols in a graph gives a bool only once a branch asks for it.
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        **grouped,
    )
    return out.transpose(1, 2)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, lengths: list[int]) -> Tensor:
    """Each sequence of a packed row attends to itself; lengths that are alike enough go as one padded batch."""
    longest = max(lengths, default=0)
    if all(length == longest for length in lengths):
        q, k, v = (x.reshape(len(lengths), longest, *x.shape[2:]) for x in (q, k, v))
        return _attend(q, k, v, causal, scale).reshape(1, -1, *q.shape[2:])
    if len(lengths) * longest > 2 * q.shape[1]:
        parts = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
        return torch.cat([_attend(q, k, v, causal, scale) for q, k, v in parts], 1)
    real = torch.arange(longest, device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    place = real.flatten().nonzero()[:, 0]
    q, k, v = (_scatter(x, place, len(lengths), longest) for x in (q, k, v))
    # Padding stands after the real keys, where a causal query never looks.
    out = _attend(q, k, v, causal, scale, None if causal else real[:, None, None])
    return out.flatten(0, 1)[place][None]


def _scatter(x: Tensor, place: Tensor, num_sequences: int, longest: int) -> Tensor:
    """Rows of x (1, T, H, D) at their places in zeros (num_sequences, longest, H, D)."""
    padded = x.new_zeros(num_sequences * longest, *x.shape[2:])
    return padded.index_copy(0, place, x[0]).unflatten(0, (num_sequences, longest))


def _sequence_lengths(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    if not offsets or offsets[0] != 0 or offsets[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"rope_attention: cu_seqlens {offsets} must rise from 0 to the number of tokens, {num_tokens}."
        )
    return lengths


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
            attention never crosses them. Its values are checked where they are on the CPU.
        scale: of the scores; D^-1/2 unless given.
        backend: "auto" or "torch".

    Returns:
        (B, Tq, Hq, D), of q's dtype. The rotation and the softmax are computed in float32.

    Raises:
        ValueError: shapes, dtypes, devices or sequence bounds that do not fit, or a backend that cannot run them.
    """
    _check(q, k, v, positions, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (q, k, v, positions, theta, causal, cu_seqlens, scale)
    backend = choose("rope_attention", KERNELS, backend, *arguments)
    # A graph cannot depend on the lengths of packed sequences: in it, they stay inside the torch op.
    if backend == TORCH and (cu_seqlens is None or not torch.compiler.is_compiling()):
        return rope_attention_reference(*arguments)
    return apply(RopeAttention, *arguments, backend)


def _check(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.rank("rope_attention", name, tensor, "B T H D")
    checks.alike("rope_attention", q=q, k=k, v=v)
    checks.shape("rope_attention", "k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]), "q", q)
    checks.shape("rope_attention", "v", v, k.shape, "k", k)
    checks.heads("rope_attention", q, k)
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"rope_attention: {q.shape[1]} queries stand at the end of {k.shape[1]} keys: too few keys.")
    _check_positions("rope_attention", positions, "k", k)
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        given = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"rope_attention: cu_seqlens is {given}; it needs to be (num_sequences + 1,) torch.int32.")
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        given = f"q is {tuple(q.shape)} and k {tuple(k.shape)}"
        raise ValueError(f"rope_attention: cu_seqlens packs sequences of queries and keys alike into B = 1; {given}.")
    if checks.may_read(cu_seqlens):
        _sequence_lengths(cu_seqlens, q.shape[1])


def _check_positions(operator: str, positions: Tensor, name: str, x: Tensor) -> None:
    checks.integer(operator, "positions", positions)
    checks.shape(operator, "positions", positions, x.shape[:2], name, x)
    checks.on_device(operator, "positions", positions, name, x)
    if x.shape[-1] % 2:
        raise ValueError(f"{operator}: rotary positions turn pairs; a head of {x.shape[-1]} is odd.")


class RopeAttention(torch.autograd.Function):
    """`rope_attention` through its torch ops; lse is the logarithm of each softmax's denominator, (B, Hq, Tq)."""

    @staticmethod
    def forward(ctx, q, k, v, positions, theta, causal, cu_seqlens, scale, backend):
        q, k, v, positions = q.contiguous(), k.contiguous(), v.contiguous(), positions.contiguous()
        numbers = (theta, causal, scale, backend)
        out, lse = rope_attention_forward(q, k, v, positions, cu_seqlens, *numbers)
        ctx.save_for_backward(q, k, v, positions, cu_seqlens, out, lse)
        ctx.numbers = numbers
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grads = rope_attention_backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        return *grads, None, None, None, None, None, None


# In order of preference.
KERNELS: dict[str, Kernel] = {}


def _torch_forward(q, k, v, positions, cu_seqlens, theta, causal, scale):
    out = rope_attention_reference(q, k, v, positions, theta, causal, cu_seqlens, scale)
    return out.contiguous(), statistics(q, (), TORCH)


def _torch_backward(grad_out, q, k, v, positions, cu_seqlens, out, lse, theta, causal, scale):
    return gradients(
        lambda q, k, v: rope_attention_reference(q, k, v, positions, theta, causal, cu_seqlens, scale),
        (q, k, v),
        grad_out,
    )


def _fake_forward(q, k, v, positions, cu_seqlens, theta, causal, scale, backend):
    batch, num_queries, num_heads, _ = q.shape
    return torch.empty_like(q), statistics(q, (batch, num_heads, num_queries), backend)


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
    fake=lambda grad_out, q, k, v, *rest: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
