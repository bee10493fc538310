"""The residual sum and its RMSNorm in one pass, beside the two in torch."""

import torch.nn.functional as F
from torch import Tensor

from vlcore.bench.alternatives import EPS, liger
from vlcore.bench.harness import Case
from vlcore.bench.shapes import row_cases


def _in_two(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def _case(rows: int, size: int, trains: bool = False) -> Case:
    return Case(
        operator="add_rms_norm",
        shape=f"{rows} × {size}",
        inputs=lambda make: (make(rows, size), make(rows, size), make(size)),
        peers={"+, F.rms_norm": _in_two, "Liger": liger("liger_fused_add_rms_norm", EPS)},
        elements=(8 if trains else 4) * rows * size,
        flops=(13 if trains else 5) * rows * size,
        trains=trains,
    )


CASES = row_cases(_case, lambda llama: llama.hidden_size)
