"""The compiled extensions, None where this build has none, and Triton's launchers."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor


def _load(name: str):
    try:
        return import_module(f"vlcore.{name}")
    except ModuleNotFoundError:
        return None


cpp = _load("_C")
cuda = _load("_cuda")


# The instructions that C++ kernels use, of csrc/kernels.h: those of this machine. Tests lower it.
level: int = cpp.best_level() if cpp else 0
# Whether the machine multiplies whole tiles (AMX), as torch's matrix products do and the kernels do not.
multiplies_tiles: bool = cpp.multiplies_tiles() if cpp else False
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def run_cpp(kernel: str, dtype: torch.dtype, *args) -> None:
    """Call a function of the C++ extension for tensors of a dtype; None crosses as a null pointer."""
    # OpenMP keeps a count for each thread that calls it; in a new one, torch sets its own only when it is asked for it.
    torch.get_num_threads()
    getattr(cpp, kernel)(*args, (_DTYPES[dtype], level))


def strided(tensor: Tensor) -> tuple:
    """A tensor as a kernel takes one that need not be contiguous: with its strides, but for the last, which is 1."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor, *tensor.stride()[:-1]


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, fresh and not yet written, on huge pages where the system has them: to be read again and again from
    memory, a quarter faster."""
    if cpp is not None and tensor.device.type == "cpu":
        cpp.prefer_huge_pages(tensor, tensor.nbytes)
    return tensor


def cpp_refusals(x: Tensor) -> list[str]:
    """Why no C++ kernel can run a tensor like x."""
    if cpp is not None and x.is_cpu and x.dtype in _DTYPES:
        return []
    reasons = {
        "vlcore was built without its C++ extension": cpp is None,
        "it runs on the CPU only": x.device.type != "cpu",
        "it computes in float32 and bfloat16 only": x.dtype not in _DTYPES,
    }
    return [reason for reason, applies in reasons.items() if applies]


def triton(operator: str, launcher: str) -> Callable:
    """The launcher in kernels/<operator>.py, imported when first called: Triton is optional, and slow to import."""

    def launch(*args):
        return getattr(import_module(f"vlcore.kernels.{operator}"), launcher)(*args)

    return launch
