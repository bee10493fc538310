"""What every Triton launcher needs to know; importing it does not import Triton."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

AVAILABLE = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The widest row that one program holds.
MAX_BLOCK = 65536


def refusals(*tensors: Tensor) -> list[str]:
    """Why Triton cannot run these tensors."""
    reasons = {
        "Triton is not installed": not AVAILABLE,
        "Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1)": not (
            INTERPRETED or all(tensor.is_cuda for tensor in tensors)
        ),
        "it computes in float32, too coarse for float64": any(tensor.dtype == torch.float64 for tensor in tensors),
    }
    return [reason for reason, applies in reasons.items() if applies]


def worthwhile(x: Tensor, *others) -> bool:
    """Triton's interpreter is for tests: nobody wants it who did not ask."""
    return x.is_cuda and not INTERPRETED


def num_warps(block: int) -> int:
    return min(max(block // 256, 4), 32)
