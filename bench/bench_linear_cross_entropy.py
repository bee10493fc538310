"""The 1.3B's head and loss on an image with text: 512 of 1088 tokens supervised, or all; beside all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore.bench.alternatives import liger
from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.bench.shapes import LLAMA, PROMPT, TEXT_TOKENS

VOCABULARY, SIZE = LLAMA.vocab_size, LLAMA.hidden_size


def _all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _case(rows: int, supervised: int, trains: bool) -> Case:
    def inputs(make: Maker) -> Inputs:
        labels = torch.randint(VOCABULARY, (rows,), device=make.device)
        labels[: rows - supervised] = -100
        return make(rows, SIZE), make(VOCABULARY, SIZE, scale=SIZE**-0.5), labels

    return Case(
        operator="linear_cross_entropy",
        shape=f"{supervised} of {rows} × {SIZE} → {VOCABULARY}",
        inputs=inputs,
        peers={"F.linear, F.cross_entropy": _all_logits, "Liger": liger("liger_fused_linear_cross_entropy")},
        flops=2 * supervised * SIZE * VOCABULARY * (3 if trains else 1),
        trains=trains,
    )


CASES = [
    _case(PROMPT, TEXT_TOKENS, False),
    _case(PROMPT, TEXT_TOKENS, True),
    _case(PROMPT, PROMPT, True),
]
