"""Inputs beside the benches' that reach the other entries of the launch tables: for bench/gpu_code.py, which computes
nothing, and bench/tune.py. All are differentiated that can be."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vlcore import ops
from vlcore.bench.command import cases
from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.ops.dispatch import TORCH

# Each is of another block; the last is too long for one.
ROWS = (128, 256, 512, 768, 4096, 8192, 16384, 32768)


def _norm(operator: str, tensors: int, vectors: int) -> list[Case]:
    """Rows of each length, `tensors` of them, with so many vectors of their length."""

    def inputs(size: int) -> Callable[[Maker], Inputs]:
        return lambda make: (*(make(1024, size) for _ in range(tensors)), *(make(size) for _ in range(vectors)))

    return [Case(operator=operator, shape=f"1024 × {size}", inputs=inputs(size), trains=True) for size in ROWS]


def _attention(dim: int, *, packed: bool = False) -> Case:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, backend: str) -> Tensor:
        return ops.attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend)

    def inputs(make: Maker) -> Inputs:
        return *(make(1, 1024, 8, dim) for _ in range(3)), _two_sequences(make) if packed else None

    shape = f"1024 tokens{' of two sequences' * packed}, 8 heads of {dim}"
    return Case(operator="attention", shape=shape, inputs=inputs, function=attend, trains=True)


def _rope_attention(dim: int, kv_heads: int = 8, *, packed: bool = False) -> Case:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_seqlens: Tensor | None, *, backend: str
    ) -> Tensor:
        return ops.rope_attention(q, k, v, positions, cu_seqlens=cu_seqlens, backend=backend)

    def inputs(make: Maker) -> Inputs:
        positions = torch.arange(1024, device=make.device)[None]
        q, k, v = (make(1, 1024, heads, dim) for heads in (8, kv_heads, kv_heads))
        return q, k, v, positions, _two_sequences(make) if packed else None

    shape = f"1024 tokens{' of two sequences' * packed}, 8 heads of {dim}, {kv_heads} of keys"
    return Case(operator="rope_attention", shape=shape, inputs=inputs, function=attend, trains=True)


def _two_sequences(make: Maker) -> Tensor:
    return torch.tensor([0, 300, 1024], dtype=torch.int32, device=make.device)


def _decode_attention(keys: int, dim: int, kv_heads: int) -> Case:
    def inputs(make: Maker) -> Inputs:
        new = (make(2, 1, heads, dim) for heads in (16, kv_heads, kv_heads))
        caches = (make(2, keys, kv_heads, dim) for _ in range(2))
        return *new, *caches, torch.tensor([keys - 1, keys // 2], device=make.device)

    shape = f"2 × 16 heads of {dim}, {kv_heads} of keys, {keys} keys"
    return Case(operator="decode_attention", shape=shape, inputs=inputs)


def _rel_pos_attention(side: int, dim: int) -> Case:
    def attend(q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, *, backend: str) -> Tensor:
        return ops.rel_pos_attention(q, k, v, rel_pos_h, rel_pos_w, (side, side), backend=backend)

    def inputs(make: Maker) -> Inputs:
        tables = (make(2 * side - 1, dim, scale=0.1) for _ in range(2))
        return *(make(1, 4, side * side, dim) for _ in range(3)), *tables

    shape = f"4 × {side * side} × {dim}"
    return Case(operator="rel_pos_attention", shape=shape, inputs=inputs, function=attend, trains=True)


def _window_attention(dim: int) -> Case:
    def inputs(make: Maker) -> Inputs:
        return make(1, 64, 64, 3, 4, dim), make(3, 4, dim), *(make(27, dim, scale=0.1) for _ in range(2))

    return Case(operator="window_attention", shape=f"64 × 64, 4 heads of {dim}", inputs=inputs, trains=True)


def _downsample_features(batch: int) -> Case:
    def inputs(make: Maker) -> Inputs:
        maps = (make(batch, 64, 64, 256).permute(0, 3, 1, 2) for _ in range(2))
        return *maps, make(1), make(512, 256, 3, 3, scale=0.02), make(1024, 512, 3, 3, scale=0.02)

    return Case(operator="downsample_features", shape=f"{batch} × 256 × 64 × 64", inputs=inputs, trains=True)


def _hybrid_adaptor(images: int) -> Case:
    """Of the 7B."""

    def inputs(make: Maker) -> Inputs:
        maps = (make(images, 576, 1024) for _ in range(2))
        towers = (layer for _ in range(2) for layer in (make(2048, 1024, scale=1 / 32), make(2048)))
        return *maps, *towers, make(4096, 4096, scale=1 / 64), make(4096)

    return Case(operator="hybrid_adaptor", shape=f"{images} × 576 × 2 × 1024 → 4096", inputs=inputs, trains=True)


def _scaled_gradient() -> Case:
    """What a loss's backward does to a head's gradient."""

    def scale(grad: Tensor, factor: Tensor, *, backend: str) -> Tensor:
        if backend == TORCH:
            return grad * factor
        from vlcore.kernels import linear_cross_entropy

        return linear_cross_entropy.scale(grad.clone(), factor)

    def inputs(make: Maker) -> Inputs:
        return make(16384, 2048), make()

    return Case(operator="linear_cross_entropy", shape="a number × 16384 × 2048", inputs=inputs, function=scale)


def _quantized_linear(rows: int, bits: int, group_size: int | None) -> Case:
    def inputs(make: Maker) -> Inputs:
        return make(rows, 2048), ops.quantize_weight(make(5632, 2048), bits, group_size), make(5632)

    scale = "a scale a row" if group_size is None else f"groups of {group_size}"
    shape = f"{rows} × 2048 → 5632, {bits} bits, {scale}"
    return Case(operator="quantized_linear", shape=shape, inputs=inputs, trains=True)


MORE: Mapping[str, Sequence[Case]] = {
    "add_rms_norm": _norm("add_rms_norm", tensors=2, vectors=1),
    "attention": [_attention(64, packed=True), _attention(128), _attention(128, packed=True)],
    "decode_attention": [
        _decode_attention(8192, 128, kv_heads=16),
        _decode_attention(1024, 128, kv_heads=4),
    ],
    "downsample_features": [_downsample_features(batch) for batch in (2, 4)],
    "hybrid_adaptor": [_hybrid_adaptor(images=4)],
    "layer_norm": _norm("layer_norm", tensors=1, vectors=2),
    "linear_cross_entropy": [_scaled_gradient()],
    "quantized_linear": [
        _quantized_linear(rows, bits, group_size) for rows in (1, 64, 512) for bits, group_size in ((8, None), (4, 64))
    ],
    "rel_pos_attention": [_rel_pos_attention(14, 64), _rel_pos_attention(64, 80)],
    "rms_norm": _norm("rms_norm", tensors=1, vectors=1),
    "rope_attention": [_rope_attention(64), _rope_attention(128, kv_heads=2, packed=True)],
    "window_attention": [_window_attention(80)],
}


def gpu_cases(operator: str) -> list[Case]:
    """Of the bench and of MORE."""
    return [*cases(operator), *MORE.get(operator, [])]
