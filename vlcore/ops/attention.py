"""Softmax attention, softmax(q k^T * scale) v: causal, grouped, packed; and what operators that attend share."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.dispatch import (
    AUTO,
    TORCH,
    Kernel,
    apply,
    choose,
    define,
    gradients,
    has_values,
    is_transformed,
    known,
    once_differentiable,
    remembered,
    statistics,
)

# What has second derivatives: torch's fused attention has none.
AGAIN = 'backend="torch" within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)'
# The widest head that a program of Triton's holds.
MAX_HEAD_DIM = 128
# As many tiles of 16 tokens as an axis of a grid of programs has places.
MAX_TRITON_TOKENS = 65535 * 16


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    operator: str = "attention",
) -> Tensor:
    """The definition, which every kernel is tested against; `operator` is named where bounds do not fit."""
    if cu_seqlens is None:
        return _attend(q, k, v, causal, scale)
    return _attend_packed(q, k, v, causal, scale, sequence_lengths(operator, cu_seqlens, q.shape[1]))


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale) v on (B, T, H, D); the last query stands at the last key."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if causal and num_queries < num_keys:
        causal = False
        if num_queries > 1:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
            mask = ones.tril(num_keys - num_queries)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if is_transformed():
        return _attend_by_products(q, k, v, causal, scale, mask).transpose(1, 2)
    # Comparing sizes that are symbols in a graph gives a bool only once a branch asks for it.
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **grouped)
    return out.transpose(1, 2)


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None
) -> Tensor:
    """What torch's fused attention computes, on (B, H, T, D), in functions of which torch knows the batches and all
    derivatives."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)


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


def sequence_lengths(operator: str, cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """The lengths of packed sequences, where their bounds fit."""
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    if not offsets or offsets[0] != 0 or offsets[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(f"{operator}: cu_seqlens {offsets} must rise from 0 to the number of tokens, {num_tokens}.")
    return lengths


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Attend with heads next to each other, as projections give them: their views need no copies.

    Args:
        q: (B, Tq, Hq, D), float32, float16 or bfloat16; float64 on "torch".
        k, v: (B, Tk, Hkv, D), of q's dtype, Tk >= Tq; Hq is a multiple of Hkv, and query head h reads key head
            h // (Hq / Hkv).
        causal: query i sees key j when j <= i + Tk - Tq.
        cu_seqlens: (num_sequences + 1,) int32, from 0 to Tk: packs several sequences into B = 1, Tq = Tk, and
            attention never crosses them; but "triton" multiplies by 0 what is masked, so that NaN and infinities may
            reach the next sequence. Its values are checked where they are on the CPU.
        scale: of the scores; D^-1/2 unless given.
        backend: "auto", "torch", "triton" or "cpp".

    Returns:
        (B, Tq, Hq, D), of q's dtype. The softmax is computed in float32. Under torch.autocast q, k and v are cast to
        its dtype.

    Raises:
        ValueError: shapes, dtypes, devices or sequence bounds that do not fit, or a backend that cannot run them.
    """
    if autocast.is_on(q):
        options = {"causal": causal, "cu_seqlens": cu_seqlens, "scale": scale, "backend": backend}
        return autocast.run(attention, autocast.low(q), q, k, v, **options)
    backend = _chosen(q, k, v, causal, cu_seqlens, scale, backend)
    scale = checks.scale(scale, q)
    if backend == TORCH and may_split(cu_seqlens):
        return attention_reference(q, k, v, causal, cu_seqlens, scale)
    return apply(Attention, q, k, v, cu_seqlens, (causal, scale, backend))


@remembered
def _chosen(q, k, v, causal, cu_seqlens, scale, backend) -> str:
    check("attention", q, k, v, cu_seqlens)
    checks.flag("attention", "causal", causal)
    scale = checks.checked_scale("attention", scale, q)
    return choose("attention", KERNELS, backend, q, k, v, causal, cu_seqlens, scale)


def check(operator: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """What holds for every operator that attends; the values of cu_seqlens are looked at by what runs it."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.rank(operator, name, tensor, "B T H D")
    checks.alike(operator, q=q, k=k, v=v)
    (batch, queries, _, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    checks.shape(operator, "k", k, (batch, keys, kv_heads, head_dim), "q", q)
    checks.shape(operator, "v", v, k.shape, "k", k)
    checks.heads(operator, q, k)
    checks.head_dim(operator, "q", q)
    if keys < queries:
        raise ValueError(f"{operator}: {queries} queries stand at the end of {keys} keys: too few keys.")
    if cu_seqlens is None:
        return
    checks.present(operator, "cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        given = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"{operator}: cu_seqlens is {given}; it needs to be (num_sequences + 1,) torch.int32.")
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        given = f"q is {tuple(q.shape)} and k {tuple(k.shape)}"
        raise ValueError(f"{operator}: cu_seqlens packs sequences of queries and keys alike into B = 1; {given}.")


def may_split(cu_seqlens: Tensor | None) -> bool:
    """A graph cannot depend on the lengths of packed sequences: in it, they stay inside the torch op."""
    return cu_seqlens is None or has_values(cu_seqlens) or is_transformed()


class Attention(torch.autograd.Function):
    """`attention` through its torch ops; lse is the logarithm of each softmax's denominator, (B, Hq, Tq)."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, numbers):
        out, lse = attention_forward(q, k, v, cu_seqlens, *numbers)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        ctx.numbers = numbers
        return out

    @staticmethod
    @partial(once_differentiable, instead=AGAIN)
    def backward(ctx, grad_out):
        grads = attention_backward(grad_out, *ctx.saved_tensors, *ctx.numbers)
        return *grads, None, None


def cpp_forward(
    q, k, v, cu_seqlens, causal, scale, positions=None, theta=1.0, operator="attention"
) -> tuple[Tensor, Tensor]:
    """The C++ kernel -> out, lse; it rotates q and k where there are positions."""
    batch, tokens, heads, _ = q.shape
    out, lse = native.fresh(q.new_empty(*q.shape)), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    inputs, sizes = _cpp_arguments(q, k, v, cu_seqlens, positions, operator)
    native.run_cpp("attention_forward", q.dtype, *inputs, out, lse, *sizes, theta, causal, scale)
    return out, lse


def cpp_backward(
    grad_out, q, k, v, cu_seqlens, out, lse, causal, scale, positions=None, theta=1.0, operator="attention"
) -> tuple[Tensor, ...]:
    """-> grad_q, grad_k, grad_v."""
    grads = tuple(native.fresh(tensor.new_empty(tensor.shape)) for tensor in (q, k, v))
    inputs, sizes = _cpp_arguments(q, k, v, cu_seqlens, positions, operator)
    given = (grad_out.contiguous(), *inputs, out, lse, *grads)
    native.run_cpp("attention_backward", q.dtype, *given, *sizes, theta, causal, scale)
    return grads


def _cpp_arguments(q, k, v, cu_seqlens, positions, operator) -> tuple[tuple, tuple]:
    sequences = q.shape[0]
    if cu_seqlens is not None:
        sequences = len(sequence_lengths(operator, cu_seqlens, q.shape[1]))
        cu_seqlens = cu_seqlens.contiguous()
    if positions is not None:
        positions = positions.long().contiguous()
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], sequences)
    return (*map(native.strided, (q, k, v)), positions, cu_seqlens), sizes


def cpp_refusals(q, k, v, causal, cu_seqlens, scale) -> list[str]:
    elsewhere = cu_seqlens is not None and cu_seqlens.device.type != "cpu"
    return native.cpp_refusals(q) + ["it reads cu_seqlens on the CPU only"] * elsewhere


def _cpp_worthwhile(q, k, v, causal, cu_seqlens, scale) -> bool:
    """Where a call is not over before it has begun: torch's own attention costs less to call."""
    least = 1 << 22 if q.dtype == torch.float32 else 1 << 18
    return known(q.numel() * k.shape[1] >= least)


def triton_refusals(q, k, v, causal, cu_seqlens, scale) -> list[str]:
    longest = max(q.shape[1], k.shape[1])
    reasons = {
        f"a head of {q.shape[3]} is not in 1..{MAX_HEAD_DIM}": not 1 <= q.shape[3] <= MAX_HEAD_DIM,
        f"{longest} tokens are more than {MAX_TRITON_TOKENS}": longest > MAX_TRITON_TOKENS,
    }
    return launch.dot_refusals(q) + [reason for reason, applies in reasons.items() if applies]


def triton_bounds(operator: str, cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """cu_seqlens where Triton reads them; a GPU's own values are not looked at, which would make it wait."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        sequence_lengths(operator, cu_seqlens, q.shape[1])
    elif cu_seqlens.shape[0] < 2 and q.shape[1]:
        raise ValueError(f"{operator}: cu_seqlens {tuple(cu_seqlens.shape)} hold no sequence for {q.shape[1]} tokens.")
    return cu_seqlens.to(q.device).contiguous()


_launch_forward, _launch_backward = (native.triton("attention", name) for name in ("forward", "backward"))


def _triton_forward(q, k, v, cu_seqlens, causal, scale) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, v, triton_bounds("attention", cu_seqlens, q), causal, scale)


def _triton_backward(grad_out, q, k, v, cu_seqlens, out, lse, causal, scale) -> tuple[Tensor, ...]:
    return _launch_backward(grad_out, q, k, v, triton_bounds("attention", cu_seqlens, q), out, lse, causal, scale)


# In order of preference.
KERNELS = {
    "triton": Kernel(_triton_forward, _triton_backward, triton_refusals, launch.worthwhile),
    "cpp": Kernel(cpp_forward, cpp_backward, cpp_refusals, _cpp_worthwhile),
}


def _torch_forward(q, k, v, cu_seqlens, causal, scale):
    return attention_reference(q, k, v, causal, cu_seqlens, scale).contiguous(), statistics(q, (), TORCH)


def _torch_backward(grad_out, q, k, v, cu_seqlens, out, lse, causal, scale):
    return gradients(lambda q, k, v: attention_reference(q, k, v, causal, cu_seqlens, scale), (q, k, v), grad_out)


def fake_forward(q, k, v, *rest):
    return q.new_empty(q.shape), statistics(q, (q.shape[0], q.shape[2], q.shape[1]), rest[-1])


def fake_backward(grad_out, q, k, v, *rest):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v))


attention_forward = define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, bool causal, float scale, str backend)"
    " -> (Tensor out, Tensor lse)",
    KERNELS,
    _torch_forward,
    fake=fake_forward,
)
attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor out, Tensor lse,"
    " bool causal, float scale, str backend) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    KERNELS,
    _torch_backward,
    fake=fake_backward,
)
