"""One token a row through a whole LLaMA block: norm, attention over the caches, norm, SwiGLU, in one call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vlcore import native
from vlcore.ops import autocast, checks
from vlcore.ops.add_rms_norm import add_rms_norm
from vlcore.ops.decode_attention import cache_refusals, decode_attention
from vlcore.ops.dispatch import AUTO, TORCH, Kernel, choose, define, known, written
from vlcore.ops.linear import MAX_ROWS, linear
from vlcore.ops.quantized_linear import QuantizedWeight, group_refusals, quantized_linear
from vlcore.ops.rms_norm import rms_norm
from vlcore.ops.swiglu import swiglu


def apply_weight(x: Tensor, weight: Tensor | QuantizedWeight, *, backend: str = AUTO) -> Tensor:
    """The linear layer of a weight, plain or quantised: x (..., K) -> (..., N)."""
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, backend=backend)
    return linear(x, weight, backend=backend)


class BlockWeights(NamedTuple):
    """The weights of a LLaMA block: norms (D,), and projections, plain or quantised.

    Attributes:
        attention_norm, mlp_norm: (D,).
        q: (Hq * head_dim, D); k, v: (Hkv * head_dim, D); o: (D, Hq * head_dim).
        gate, up: (F, D); down: (D, F).
    """

    attention_norm: Tensor
    mlp_norm: Tensor
    q: Tensor | QuantizedWeight
    k: Tensor | QuantizedWeight
    v: Tensor | QuantizedWeight
    o: Tensor | QuantizedWeight
    gate: Tensor | QuantizedWeight
    up: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight


def side_by_side(weights: Sequence[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight | None:
    """One weight of all their rows, where they are neighbours in memory."""
    first = weights[0]
    if not isinstance(first, QuantizedWeight):
        return _neighbours(weights)
    if len({_form(weight) for weight in weights}) > 1:
        return None
    values, scales = (_neighbours([getattr(weight, name) for weight in weights]) for name in ("values", "scales"))
    if values is None or scales is None:
        return None
    return QuantizedWeight(values, scales, first.bits, first.group_size, (len(values), first.shape[1]))


def _neighbours(tensors: Sequence) -> Tensor | None:
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        alike = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        if not alike or tensor.data_ptr() != end or _storage(tensor) != _storage(first):
            return None
        end += tensor.nbytes
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _project_each(project: Callable, x: Tensor, weights: Sequence[Tensor | QuantizedWeight]) -> list[Tensor]:
    return [project(x, weight) for weight in weights]


def _project_all(project: Callable, x: Tensor, weights: Sequence[Tensor | QuantizedWeight]) -> Sequence[Tensor]:
    """By one product where the weights are neighbours: on a GPU each launch waits for the one before."""
    whole = None if torch.compiler.is_compiling() else side_by_side(weights)
    if whole is None:
        return _project_each(project, x, weights)
    return project(x, whole).split([weight.shape[0] for weight in weights], -1)


def decode_block_reference(
    x: Tensor,
    residual: Tensor | None,
    weights: BlockWeights,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    theta: float = 1e4,
    eps: float = 1e-6,
    backend: str = TORCH,
) -> tuple[Tensor, Tensor]:
    """The definition, of operators that have their own. Writes to the caches, as the operator does."""

    project = partial(apply_weight, backend=backend)
    if residual is None:
        normed, total = rms_norm(x, weights.attention_norm, eps, backend=backend), x
    else:
        normed, total = add_rms_norm(x, residual, weights.attention_norm, eps, backend=backend)
    head_dim = key_cache.shape[-1]
    # Of several rows, each of the parts of one product would have to be copied for what attends.
    several = _project_all if len(x) == 1 else _project_each
    q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in several(project, normed, (weights.q, weights.k, weights.v)))
    attended = decode_attention(q, k, v, key_cache, value_cache, lengths, theta=theta, backend=backend)
    attended = project(attended.flatten(2), weights.o)
    normed, total = add_rms_norm(attended, total, weights.mlp_norm, eps, backend=backend)
    gated = swiglu(*_project_all(project, normed, (weights.gate, weights.up)), backend=backend)
    return project(gated, weights.down), total


def decode_block(
    x: Tensor,
    residual: Tensor | None,
    weights: BlockWeights,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    theta: float = 1e4,
    eps: float = 1e-6,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Take one new token a row through a block of LLaMA, whose keys and values are appended to the caches.

    The stream that the block reads is x + residual, and the one that the next block reads is the sum of what this one
    returns. Writes to the caches as `decode_attention` does. There is no gradient.

    Args:
        x: (B, 1, D), float32, float16 or bfloat16; float64 on "torch".
        residual: (B, 1, D), of x's dtype, or None for none.
        weights: plain ones are of x's dtype.
        key_cache, value_cache: (B, S, Hkv, head_dim), of x's dtype; keys in the cache are rotated.
        lengths: (B,), int32 or int64, tokens already in the cache of each row, below S.
        theta: base of the rotary wavelengths.
        eps: of both norms.
        backend: "auto", "torch", or "cpp", which takes up to 16 rows.

    Returns:
        What the MLP gives, and the stream that it is to be added to: both (B, 1, D), of x's dtype. Under torch.autocast
        x and residual are cast to the dtype of the caches, and all is computed in it.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, a gradient is asked for, or a backend that
            cannot run them.
    """
    if autocast.is_on(x):
        checks.present("decode_block", "key_cache", key_cache)
        options = {"theta": theta, "eps": eps, "backend": backend}
        arguments = (x, residual, weights, key_cache, value_cache, lengths)
        return autocast.run(decode_block, key_cache.dtype, *arguments, **options)
    _check(x, residual, weights, key_cache, value_cache, lengths)
    checks.number("decode_block", "theta", theta)
    checks.number("decode_block", "eps", eps)
    forms = [_form(weight) for weight in weights[2:]]  # as short as an error that shows them should be
    chosen = choose("decode_block", KERNELS, backend, x, key_cache, value_cache, forms)
    if chosen == TORCH:
        return decode_block_reference(x, residual, weights, key_cache, value_cache, lengths, theta, eps, backend)
    tensors = [weight.values if isinstance(weight, QuantizedWeight) else weight for weight in weights]
    scales = [weight.scales for weight in weights if isinstance(weight, QuantizedWeight)]
    bits = [bits for bits, *_ in forms]
    given = (x, residual, tensors, scales, bits, key_cache, value_cache, lengths, theta, eps)
    y, total = decode_block_forward(*given, chosen)
    written(key_cache, value_cache)
    return y, total


def _form(weight: Tensor | QuantizedWeight) -> tuple[int, int, int]:
    """Bits, inputs and groups of a quantised weight; zeros for a plain one."""
    return (weight.bits, weight.shape[1], weight.scales.shape[1]) if isinstance(weight, QuantizedWeight) else (0, 0, 1)


def _check(
    x: Tensor, residual: Tensor | None, weights: BlockWeights, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> None:
    checks.rank("decode_block", "x", x, "B 1 D")
    checks.rank("decode_block", "key_cache", key_cache, "B S Hkv D")
    if not isinstance(weights, BlockWeights):
        raise ValueError(f"decode_block: weights is {checks.kind(weights)}; BlockWeights holds what it takes.")
    plain = {name: w for name, w in weights._asdict().items() if not isinstance(w, QuantizedWeight)}
    for name, weight in plain.items():
        checks.present("decode_block", name, weight)
    checks.alike("decode_block", x=x, residual=residual, key_cache=key_cache, value_cache=value_cache, **plain)
    (batch, num_steps, size), (_, capacity, kv_heads, head_dim) = x.shape, key_cache.shape
    if num_steps != 1:
        raise ValueError(f"decode_block: x is {tuple(x.shape)}; it takes one token a row.")
    if residual is not None:
        checks.shape("decode_block", "residual", residual, x.shape, "x", x)
    checks.shape("decode_block", "key_cache", key_cache, (batch, capacity, kv_heads, head_dim), "x", x)
    checks.shape("decode_block", "value_cache", value_cache, key_cache.shape, "key_cache", key_cache)
    if head_dim % 2:
        raise ValueError(f"decode_block: rotary positions turn pairs; a head of {head_dim} is odd.")
    query_size, kv_size, hidden_size = weights.q.shape[0], kv_heads * head_dim, weights.gate.shape[0]
    if kv_size == 0 or query_size % kv_size:
        raise ValueError(f"decode_block: q gives {query_size} outputs, no multiple of the cache's {kv_size} a token.")
    needed: list[tuple[int, ...]] = [(size,), (size,), (query_size, size), (kv_size, size), (kv_size, size)]
    needed += [(size, query_size), (hidden_size, size), (hidden_size, size), (size, hidden_size)]
    if [weight.shape for weight in weights] != needed:
        name, weight, shape = next(
            found for found in zip(weights._fields, weights, needed, strict=True) if found[1].shape != found[2]
        )
        given = f"x {tuple(x.shape)} and the cache {tuple(key_cache.shape)}"
        raise ValueError(f"decode_block: the weight {name} is {tuple(weight.shape)}; {given} need {shape}.")
    for name, weight in zip(weights._fields, weights, strict=True):
        if isinstance(weight, QuantizedWeight):
            checks.on_device("decode_block", name, weight.values, "x", x)
    checks.integer("decode_block", "lengths", lengths)
    checks.shape("decode_block", "lengths", lengths, (batch,), "x", x)
    checks.on_device("decode_block", "lengths", lengths, "x", x)
    checks.without_gradient("decode_block", x, residual, key_cache, value_cache, *plain.values())
    checks.room("decode_block", lengths, key_cache)


def _cpp_refusals(x: Tensor, key_cache: Tensor, value_cache: Tensor, forms: list[tuple[int, int, int]]) -> list[str]:
    refused = []
    if not known(x.shape[0] <= MAX_ROWS):
        refused.append(f"{x.shape[0]} rows are more than {MAX_ROWS}")
    if len({*forms[:3]}) > 1 or forms[4] != forms[5]:
        refused.append("q, k and v, and gate and up, must be quantised alike")
    refused += [reason for _, *sizes in dict.fromkeys(forms) for reason in group_refusals(*sizes)]
    return native.cpp_refusals(x) + cache_refusals(key_cache, value_cache) + refused


def _cpp_forward(x, residual, tensors, scales, bits, key_cache, value_cache, lengths, theta, eps):
    attention_norm, mlp_norm, *projections = [tensor.contiguous() for tensor in tensors]
    steps = iter(scales)
    weights = []
    for values, width in zip(projections, bits, strict=True):
        scale = next(steps).contiguous() if width else None
        weights.append((values, scale, 0 if scale is None else scale.shape[1], width))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, total, lengths = torch.empty_like(x), torch.empty_like(x), lengths.long().contiguous()
    kv_heads, head_dim = key_cache.shape[2:]
    heads, hidden_size = projections[0].shape[0] // head_dim, projections[4].shape[0]
    given = (x, residual, attention_norm, mlp_norm, *weights, key_cache, value_cache, lengths, y, total)
    sizes = (x.shape[0], x.shape[2], hidden_size, *key_cache.stride()[:2], heads, kv_heads, head_dim)
    native.run_cpp("decode_block_forward", x.dtype, *given, *sizes, theta, eps)
    return y, total


# In order of preference; without backwards.
KERNELS = {"cpp": Kernel(_cpp_forward, None, _cpp_refusals)}


def _torch_forward(x, residual, tensors, scales, bits, key_cache, value_cache, lengths, theta, eps):
    steps, size = iter(scales), x.shape[-1]
    inputs = (size, size, size, tensors[2].shape[0], size, size, tensors[6].shape[0])
    projections = []
    for values, width, num_inputs in zip(tensors[2:], bits, inputs, strict=True):
        if width:
            scale = next(steps)
            group_size = None if scale.shape[1] == 1 else num_inputs // scale.shape[1]
            values = QuantizedWeight(values, scale, width, group_size, (values.shape[0], num_inputs))
        projections.append(values)
    weights = BlockWeights(tensors[0], tensors[1], *projections)
    y, total = decode_block_reference(x, residual, weights, key_cache, value_cache, lengths, theta, eps)
    return y, total


decode_block_forward = define(
    "decode_block_forward(Tensor x, Tensor? residual, Tensor[] weights, Tensor[] scales, int[] bits,"
    " Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor lengths, float theta, float eps, str backend)"
    " -> (Tensor y, Tensor total)",
    KERNELS,
    _torch_forward,
    fake=lambda x, *rest: (torch.empty_like(x), torch.empty_like(x)),
)
