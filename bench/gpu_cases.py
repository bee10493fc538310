"""Inputs beside the benches' that reach the other entries of the launch tables, for bench/gpu_code.py, which computes
nothing, and bench/tune.py."""

from collections.abc import Mapping, Sequence

from vlcore.bench.harness import Case


def _rms_norm(size: int) -> Case:
    return Case(
        operator="rms_norm",
        shape=f"1024 × {size}",
        inputs=lambda make: (make(1024, size), make(size)),
        trains=True,
    )


MORE: Mapping[str, Sequence[Case]] = {"rms_norm": [_rms_norm(size) for size in (768, 4096, 16384, 32768)]}
