"""What every Triton launcher needs to know; importing it does not import Triton.

How a kernel is launched (its blocks, warps and pipeline stages) is written down, not searched for at run time:
kernels/<operator>.json holds a table for each kernel and architecture, which `bench/tune.py` writes on a GPU.
"""

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

AVAILABLE = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter takes bfloat16 for integers; tests teach it better.
BFLOAT16_INTERPRETED = False
# The widest row that one program holds.
MAX_BLOCK = 65536


def refusals(*tensors: Tensor) -> list[str]:
    """Why Triton cannot run these tensors."""
    on_gpu, wide = True, False
    for tensor in tensors:
        on_gpu, wide = on_gpu and tensor.is_cuda, wide or tensor.dtype == torch.float64
    too_old = on_gpu and _too_old(tensors[0].device.index)
    if AVAILABLE and (on_gpu or INTERPRETED) and not too_old and not wide:
        return []
    reasons = {
        "Triton is not installed": not AVAILABLE,
        "Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1)": not (INTERPRETED or on_gpu),
        "it needs a GPU since Ampere (compute capability 8.0)": too_old,
        "it computes in float32, too coarse for float64": wide,
    }
    return [reason for reason, applies in reasons.items() if applies]


def _too_old(index: int) -> bool:
    # torch.compile takes the properties for a constant, and would look through the cache with a warning.
    properties = torch.cuda.get_device_properties if torch.compiler.is_compiling() else _properties
    return properties(index).major < 8


@cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def dot_refusals(*tensors: Tensor) -> list[str]:
    """Why Triton cannot run a kernel that multiplies matrices on these tensors."""
    wrong = INTERPRETED and not BFLOAT16_INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return refusals(*tensors) + ["Triton's interpreter multiplies matrices of bfloat16 wrongly"] * wrong


def row_refusals(x: Tensor, *others: Tensor) -> list[str]:
    """Why Triton cannot run a kernel on the rows of x (..., N)."""
    reasons = refusals(x, *others)
    if not 1 <= x.shape[-1] <= MAX_BLOCK:
        reasons.append(f"a row of {x.shape[-1]} is not in 1..{MAX_BLOCK}")
    return reasons


def worthwhile(x: Tensor, *others) -> bool:
    """Triton's interpreter is for tests: nobody wants it who did not ask."""
    return x.is_cuda and not INTERPRETED


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes 2 us for it outside of a kernel."""
    return -(-a // b)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least a number, which is not negative: 0 of 0, as Triton has it."""
    return 1 << (number - 1).bit_length() if number > 0 else 0


@cache
def architecture(index: int | None) -> str:
    """The table that a GPU is launched by. The data centre's Hopper and Blackwell have their own; that of sm_80 fits
    the 99 KiB of shared memory that every GPU since Ampere has, and is the interpreter's."""
    major = 8 if index is None else _properties(index).major
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def settings(operator: str, kernel: str, device: torch.device, **sizes: int) -> dict[str, int]:
    """How to launch a kernel: the first entry of its table whose limits ("up_to") all of the sizes keep.

    Args:
        operator, kernel: kernels/<operator>.json, and the name of a kernel in it.
        device: of the tensors.
        sizes: what the choice depends on, such as rows or the head's dimension; powers of two keep the cache small.

    Returns:
        Constants of the kernel, num_warps and num_stages by name. Not to be changed.
    """
    return look_up(operator, kernel, architecture(device.index), tuple(sizes.items()))


@cache
def look_up(operator: str, kernel: str, architecture: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """`settings` on an architecture; what watches launches stands in for it."""
    entry = table(operator)[kernel][architecture][first_that_fits(operator, kernel, architecture, sizes)]
    return {name: value for name, value in entry.items() if name != "up_to"}


def first_that_fits(operator: str, kernel: str, architecture: str, sizes: tuple[tuple[str, int], ...]) -> int:
    """The place in its table of the entry that `settings` takes."""
    for place, entry in enumerate(table(operator)[kernel][architecture]):
        if all(size <= entry.get("up_to", {}).get(name, size) for name, size in sizes):
            return place
    raise LookupError(f"The table of {operator}'s {kernel} on {architecture} has no entry for {dict(sizes)}.")


@cache
def table(operator: str) -> dict:
    """kernels/<operator>.json."""
    return json.loads((Path(__file__).parent / f"{operator}.json").read_text())
