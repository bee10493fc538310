"""RMSNorm beside torch's own: rows of one decoded token, and of an image with text."""

import torch.nn.functional as F

from vlcore.bench.alternatives import EPS, Alternative, liger, llama_rms_norm
from vlcore.bench.harness import Case
from vlcore.bench.shapes import BATCH, LLAMA, LLAMA_7B, PROMPT


def _case(rows: int, size: int, trains: bool = False) -> Case:
    return Case(
        operator="rms_norm",
        shape=f"{rows} × {size}",
        inputs=lambda make: (make(rows, size), make(size)),
        peers={
            "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
            "transformers": Alternative(llama_rms_norm, "transformers", ("cpu", "cuda")),
            "Liger": liger("liger_rms_norm", EPS),
        },
        elements=(5 if trains else 2) * rows * size,
        flops=(12 if trains else 4) * rows * size,
        trains=trains,
    )


CASES = [
    _case(1, LLAMA.hidden_size),
    _case(PROMPT, LLAMA.hidden_size),
    _case(PROMPT, LLAMA.hidden_size, trains=True),
    _case(PROMPT, LLAMA_7B.hidden_size),
    _case(BATCH, LLAMA.hidden_size),
    _case(BATCH, LLAMA.hidden_size, trains=True),
]
