"""What the demo ran on, and the precision that is fastest there."""

import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch

# Instructions that multiply bfloat16; without them it is emulated, and slower than float32.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """(name of the processor, its flags), from Linux's /proc/cpuinfo; elsewhere what Python knows, and no flags."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return name, frozenset((fields.get("flags") or fields.get("Features", "")).split())


def fast_precision(flags: frozenset[str]) -> Literal["fp32", "bf16"]:
    """ "bf16" where the processor multiplies it itself, otherwise "fp32"."""
    return "bf16" if flags & BF16_FLAGS else "fp32"


def describe(precision: str) -> dict[str, Any]:
    """The machine as report.json has it."""
    name, _ = read_cpu()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": precision,
    }
