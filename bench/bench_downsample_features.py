"""SAM's two maps to 576 tokens, beside the public code's way: each branch through the convolutions by itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcore.bench.harness import Case, Inputs, Maker

CHANNELS, SIDE, SIZE = 256, 64, 96
FLOPS = 2 * 9 * 2 * CHANNELS**2 * ((SIZE // 2) ** 2 + 4 * (SIZE // 4) ** 2)


def _inputs(make: Maker) -> Inputs:
    # As the tower gives them, channels-last in memory.
    maps = (make(1, SIDE, SIDE, CHANNELS).permute(0, 3, 1, 2) for _ in range(2))
    return *maps, make(1), make(2 * CHANNELS, CHANNELS, 3, 3, scale=0.02), make(4 * CHANNELS, 2 * CHANNELS, 3, 3)


def _two_branches(detail: Tensor, skip: Tensor, alpha: Tensor, conv1: Tensor, conv2: Tensor) -> Tensor:
    first, second = (_one_branch(x, conv1, conv2) for x in (detail, skip))
    return torch.add(first, alpha * second)


def _one_branch(x: Tensor, conv1: Tensor, conv2: Tensor) -> Tensor:
    resized = F.interpolate(x.float(), (SIZE, SIZE), mode="bilinear", align_corners=False).to(x.dtype)
    hidden = F.conv2d(resized, conv1, stride=2, padding=1)
    return F.conv2d(hidden, conv2, stride=2, padding=1).flatten(2).transpose(1, 2)


CASES = [
    Case(
        operator="downsample_features",
        shape=f"{CHANNELS} × {SIDE} × {SIDE}",
        inputs=_inputs,
        peers={"two branches": _two_branches},
        flops=FLOPS * (3 if trains else 1),
        trains=trains,
    )
    for trains in (False, True)
]
