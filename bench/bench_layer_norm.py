"""LayerNorm beside torch's own: a row, a prompt's width, and the maps of the two vision towers."""

import torch.nn.functional as F

from vlcore.bench.alternatives import EPS, liger
from vlcore.bench.harness import Case
from vlcore.bench.shapes import HYBRID, LLAMA, PROMPT


def _case(rows: int, size: int, trains: bool = False) -> Case:
    return Case(
        operator="layer_norm",
        shape=f"{rows} × {size}",
        inputs=lambda make: (make(rows, size), make(size), make(size)),
        peers={
            "F.layer_norm": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS),
            "Liger": liger("liger_layer_norm", EPS),
        },
        elements=(5 if trains else 2) * rows * size,
        flops=(18 if trains else 7) * rows * size,
        trains=trains,
    )


SAM, SIGLIP = HYBRID.sam, HYBRID.siglip
assert SAM
CASES = [
    _case(1, LLAMA.hidden_size),
    _case(SIGLIP.num_tokens, SIGLIP.hidden_size),
    _case(SAM.grid**2, SAM.hidden_size),
    _case(PROMPT, LLAMA.hidden_size),
    _case(PROMPT, LLAMA.hidden_size, trains=True),
]
