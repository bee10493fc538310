"""SwiGLU beside the two passes of torch: one decoded token, and an image with text."""

import torch.nn.functional as F

from vlcore.bench.alternatives import liger
from vlcore.bench.harness import Case
from vlcore.bench.shapes import BATCH, LLAMA, LLAMA_7B, PROMPT


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


CASES = [
    _case(1, LLAMA.intermediate_size),
    _case(PROMPT, LLAMA.intermediate_size),
    _case(PROMPT, LLAMA.intermediate_size, trains=True),
    _case(PROMPT, LLAMA_7B.intermediate_size),
    _case(BATCH, LLAMA.intermediate_size),
    _case(BATCH, LLAMA.intermediate_size, trains=True),
]
