"""RMSNorm beside torch's own: rows of one decoded token, and of an image with text."""

import torch.nn.functional as F

from vlcore.bench.alternatives import EPS, Alternative, liger, llama_rms_norm
from vlcore.bench.harness import Case
from vlcore.bench.shapes import row_cases


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


CASES = row_cases(_case, lambda llama: llama.hidden_size)
