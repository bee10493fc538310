"""Inputs beside the benches' that reach the other entries of the launch tables: for bench/gpu_code.py, which computes
nothing, and bench/tune.py."""

from collections.abc import Mapping, Sequence

from vlcore import ops
from vlcore.bench.command import cases
from vlcore.bench.harness import Case, Inputs, Maker


def _rms_norm(size: int) -> Case:
    return Case(
        operator="rms_norm",
        shape=f"1024 × {size}",
        inputs=lambda make: (make(1024, size), make(size)),
        trains=True,
    )


def _add_rms_norm(size: int) -> Case:
    return Case(
        operator="add_rms_norm",
        shape=f"1024 × {size}",
        inputs=lambda make: (make(1024, size), make(1024, size), make(size)),
        trains=True,
    )


def _layer_norm(size: int) -> Case:
    return Case(
        operator="layer_norm",
        shape=f"1024 × {size}",
        inputs=lambda make: (make(1024, size), make(size), make(size)),
        trains=True,
    )


def _hybrid_adaptor(images: int) -> Case:
    """Towers of 1024 to the 7B's 4096."""

    def inputs(make: Maker) -> Inputs:
        maps = (make(images, 576, 1024) for _ in range(2))
        towers = (layer for _ in range(2) for layer in (make(2048, 1024, scale=1 / 32), make(2048)))
        return *maps, *towers, make(4096, 4096, scale=1 / 64), make(4096)

    return Case(operator="hybrid_adaptor", shape=f"{images} × 576 × 2 × 1024 → 4096", inputs=inputs, trains=True)


def _quantized_linear(rows: int, bits: int, group_size: int | None) -> Case:
    def inputs(make: Maker) -> Inputs:
        return make(rows, 2048), ops.quantize_weight(make(5632, 2048), bits, group_size), make(5632)

    scale = "a scale a row" if group_size is None else f"groups of {group_size}"
    shape = f"{rows} × 2048 → 5632, {bits} bits, {scale}"
    return Case(operator="quantized_linear", shape=shape, inputs=inputs, trains=True)


# A row of each entry of the norms' tables.
_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

MORE: Mapping[str, Sequence[Case]] = {
    "add_rms_norm": [_add_rms_norm(size) for size in _ROWS],
    "hybrid_adaptor": [_hybrid_adaptor(images=4)],
    "layer_norm": [_layer_norm(size) for size in _ROWS],
    "quantized_linear": [
        _quantized_linear(rows, bits, group_size) for rows in (1, 64, 640) for bits, group_size in ((8, None), (4, 64))
    ],
    "rms_norm": [_rms_norm(size) for size in (768, 4096, 16384, 32768)],
}


def gpu_cases(operator: str) -> list[Case]:
    """Of the bench and of MORE."""
    return [*cases(operator), *MORE.get(operator, [])]
