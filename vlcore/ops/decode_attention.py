"""One step of decoding: rotate q and k, write k and v into the caches, attend over what each row holds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore import native
from vlcore.kernels import launch
from vlcore.ops import autocast, checks
from vlcore.ops.apply_rope import rope_tables, rotate
from vlcore.ops.attention import MAX_HEAD_DIM, MAX_TRITON_TOKENS
from vlcore.ops.dispatch import AUTO, Kernel, choose, define, remembered, written


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    theta: float = 1e4,
    scale: float | None = None,
) -> Tensor:
    """The definition, which every kernel is tested against. Writes to the caches, as the operator does."""
    tables = rope_tables(lengths[:, None], q.shape[-1], theta, torch.promote_types(q.dtype, torch.float32))
    grouped = q.shape[2] != k.shape[2]
    q, k = rotate(torch.cat((q, k), 2), *tables).split((q.shape[2], k.shape[2]), 2)
    rows = torch.arange(q.shape[0], device=q.device)
    key_cache[rows, lengths] = k[:, 0]
    value_cache[rows, lengths] = v[:, 0]
    # On a GPU the lengths are not looked at, which would make it wait: the mask covers the whole cache.
    shortest, longest = 0, key_cache.shape[1]
    if lengths.device.type == "cpu" and lengths.numel():
        shortest, longest = (int(bound) + 1 for bound in lengths.aminmax())
    mask = None
    keys, values = key_cache[:, :longest], value_cache[:, :longest]
    if shortest != longest:
        holds = torch.arange(longest, device=q.device) <= lengths[:, None]
        mask = holds[:, None, None]
        # Behind a row's tokens may be anything, and NaN outlasts a mask.
        keys, values = (cache.where(holds[:, :, None, None], 0) for cache in (keys, values))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2).contiguous()


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    theta: float = 1e4,
    scale: float | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Attend with one new token a row, whose key and value are appended to the caches.

    Writes rope(k[b]) and v[b] to key_cache[b, lengths[b]] and value_cache[b, lengths[b]]: the one operator that
    writes to an argument. `lengths` is left alone, so that all layers of a step share it. There is no gradient.

    Args:
        q: (B, 1, Hq, D), float32, float16 or bfloat16; float64 on "torch". D is even.
        k, v: (B, 1, Hkv, D), of q's dtype; Hq is a multiple of Hkv.
        key_cache, value_cache: (B, S, Hkv, D), of q's dtype; keys in the cache are rotated.
        lengths: (B,), int32 or int64, tokens already in the cache of each row, below S; also the new token's
            position. Their values are checked where they are on the CPU.
        theta: base of the rotary wavelengths.
        scale: of the scores; D^-1/2 unless given.
        backend: "auto", "torch", "cuda", "triton" or "cpp".

    Returns:
        (B, 1, Hq, D), of q's dtype: attention over the lengths[b] + 1 tokens of each row. Under torch.autocast q, k and
        v are cast to the dtype of the caches, which are written to.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, a gradient is asked for, or a backend that
            cannot run them.
    """
    if autocast.is_on(q):
        checks.present("decode_attention", "key_cache", key_cache)
        options = {"theta": theta, "scale": scale, "backend": backend}
        arguments = (q, k, v, key_cache, value_cache, lengths)
        return autocast.run(decode_attention, key_cache.dtype, *arguments, **options)
    checks.without_gradient("decode_attention", q, k, v, key_cache, value_cache)
    backend = _chosen(q, k, v, key_cache, value_cache, lengths, theta, scale, backend)
    checks.room("decode_attention", lengths, key_cache)
    scale = checks.scale(scale, q)
    out = decode_attention_forward(q, k, v, key_cache, value_cache, lengths, theta, scale, backend)
    written(key_cache, value_cache)
    return out


@remembered
def _chosen(q, k, v, key_cache, value_cache, lengths, theta, scale, backend) -> str:
    _check(q, k, v, key_cache, value_cache, lengths)
    checks.number("decode_attention", "theta", theta)
    scale = checks.checked_scale("decode_attention", scale, q)
    return choose("decode_attention", KERNELS, backend, q, k, v, key_cache, value_cache, lengths, theta, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    checks.rank("decode_attention", "q", q, "B 1 Hq D")
    checks.rank("decode_attention", "k", k, "B 1 Hkv D")
    checks.rank("decode_attention", "key_cache", key_cache, "B S Hkv D")
    checks.alike("decode_attention", q=q, k=k, v=v, key_cache=key_cache, value_cache=value_cache)
    batch, num_steps, _, head_dim = q.shape
    if num_steps != 1:
        raise ValueError(f"decode_attention: q is {tuple(q.shape)}; it takes one token a row.")
    checks.shape("decode_attention", "k", k, (batch, 1, k.shape[2], head_dim), "q", q)
    checks.shape("decode_attention", "v", v, k.shape, "k", k)
    checks.shape("decode_attention", "key_cache", key_cache, (batch, key_cache.shape[1], *k.shape[2:]), "k", k)
    checks.shape("decode_attention", "value_cache", value_cache, key_cache.shape, "key_cache", key_cache)
    checks.heads("decode_attention", q, k)
    checks.head_dim("decode_attention", "q", q)
    checks.integer("decode_attention", "lengths", lengths)
    checks.shape("decode_attention", "lengths", lengths, (batch,), "q", q)
    checks.on_device("decode_attention", "lengths", lengths, "q", q)
    if head_dim % 2:
        raise ValueError(f"decode_attention: rotary positions turn pairs; a head of {head_dim} is odd.")


def _cpp_refusals(q, k, v, key_cache, value_cache, lengths, theta, scale) -> list[str]:
    return native.cpp_refusals(q) + cache_refusals(key_cache, value_cache)


def cache_refusals(key_cache: Tensor, value_cache: Tensor) -> list[str]:
    """Why neither C++ nor CUDA kernels can read these caches."""
    fits = key_cache.stride() == value_cache.stride() and key_cache.stride()[2:] == (key_cache.shape[3], 1)
    return ["it needs caches whose tokens are contiguous, both alike"] * (not fits)


def _cpp_forward(q, k, v, key_cache, value_cache, lengths, theta, scale) -> Tensor:
    out = q.new_empty(q.shape)
    sizes = (q.shape[0], *key_cache.stride()[:2], q.shape[2], k.shape[2], q.shape[3])
    given = (q.contiguous(), k.contiguous(), v.contiguous(), key_cache, value_cache, lengths.long().contiguous())
    native.run_cpp("decode_attention_forward", q.dtype, *given, out, *sizes, theta, scale)
    return out


def _cuda_refusals(q, k, v, key_cache, value_cache, lengths, theta, scale) -> list[str]:
    # Blocks that share a row meet in clusters.
    if reasons := native.cuda_refusals(q, since=(9, 0)):
        return reasons
    reasons = cache_refusals(key_cache, value_cache)
    if q.shape[3] not in (64, 128):
        reasons.append(f"its heads are of 64 or 128, and these of {q.shape[3]}")
    places = key_cache.stride()[:2]
    if not torch.compiler.is_compiling():  # which cannot look at offsets; the kernel checks them
        places += (key_cache.storage_offset(), value_cache.storage_offset())
    if any(place * q.element_size() % 16 for place in places):
        reasons.append("it needs caches whose tokens begin at multiples of 16 bytes")
    return reasons


def _cuda_forward(q, k, v, key_cache, value_cache, lengths, theta, scale) -> Tensor:
    out = q.new_empty(q.shape)
    sizes = (q.shape[0], *key_cache.stride()[:2], q.shape[2], k.shape[2], q.shape[3], lengths.element_size())
    given = (q.contiguous(), k.contiguous(), v.contiguous(), key_cache, value_cache, lengths.contiguous())
    native.run_cuda("decode_attention_forward", q, *given, out, *sizes, theta, scale)
    return out


def _triton_refusals(q, k, v, key_cache, value_cache, lengths, theta, scale) -> list[str]:
    reasons = {
        f"a head of {q.shape[3]} is not in 1..{MAX_HEAD_DIM}": not 1 <= q.shape[3] <= MAX_HEAD_DIM,
        "it needs caches whose heads are contiguous": (key_cache.stride(3), value_cache.stride(3)) != (1, 1),
        f"a cache of {key_cache.shape[1]} tokens has more than {MAX_TRITON_TOKENS}": (
            key_cache.shape[1] > MAX_TRITON_TOKENS
        ),
    }
    return launch.dot_refusals(q) + [reason for reason, applies in reasons.items() if applies]


# In order of preference; without backwards.
KERNELS = {
    "cuda": Kernel(_cuda_forward, None, _cuda_refusals),
    "triton": Kernel(native.triton("decode_attention", "forward"), None, _triton_refusals, launch.worthwhile),
    "cpp": Kernel(_cpp_forward, None, _cpp_refusals),
}

decode_attention_forward = define(
    "decode_attention_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor lengths, float theta, float scale, str backend) -> Tensor",
    KERNELS,
    decode_attention_reference,
    fake=lambda q, *rest: q.new_empty(q.shape),
)
