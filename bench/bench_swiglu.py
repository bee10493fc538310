"""SwiGLU beside the two passes of torch: one decoded token, and an image with text."""

import torch.nn.functional as F

from vlcore.bench.alternatives import liger
from vlcore.bench.harness import Case
from vlcore.bench.shapes import row_cases


def _case(rows: int, size: int, trains: bool = False) -> Case:
    return Case(
        operator="swiglu",
        shape=f"{rows} × {size}",
        inputs=lambda make: (make(rows, size), make(rows, size)),
        peers={"F.silu, *": lambda gate, up: F.silu(gate) * up, "Liger": liger("liger_swiglu")},
        elements=(8 if trains else 3) * rows * size,
        flops=(16 if trains else 5) * rows * size,
        trains=trains,
    )


CASES = row_cases(_case, lambda llama: llama.intermediate_size)
