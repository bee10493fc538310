"""The compiled extensions, None where this build has none, and Triton's launchers."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor


def _load(name: str):
    try:
        return import_module(f"vlcore.{name}")
    except ModuleNotFoundError:
        return None


cpp = _load("_C")
cuda = _load("_cuda")


def _no_signature(*arguments) -> None:
    return None


def _signature() -> Callable[..., bytes | None]:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if cpp is None or exchange is None:
        return _no_signature
    cpp.look_at_tensors_by(exchange, (Tensor, torch.nn.Parameter))
    return cpp.signature


# What arguments look like, as bytes: equal where tensors are of equal devices, dtypes, shapes, strides and alignment,
# and numbers and strings are equal. None where anything else is among them, or this build cannot tell.
signature = _signature()


class Kinds(dict):
    """What has been found out of kinds of calls, by their signatures: no more than `limit`, or it begins anew."""

    _all: ClassVar[list["Kinds"]] = []

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._all.append(self)

    def keep(self, kind: bytes, found: Any) -> None:
        if kind not in self and len(self) >= self.limit:
            self.clear()
        self[kind] = found

    @classmethod
    def forget(cls) -> None:
        """All of all, where what it followed from has changed besides arguments: kernels, launch tables, a driver."""
        for kinds in cls._all:
            kinds.clear()


# The instructions that C++ kernels use, of csrc/kernels.h: those of this machine. Tests lower it.
level: int = cpp.best_level() if cpp else 0
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CUDA_DTYPES = {**_DTYPES, torch.float16: 2}


def run_cpp(kernel: str, dtype: torch.dtype, *args) -> None:
    """Call a function of the C++ extension for tensors of a dtype; None crosses as a null pointer."""
    if dtype not in _DTYPES:
        raise ValueError(
            f"{kernel}: the C++ kernels, which a graph keeps to, compute in {[*_DTYPES]}, and not in {dtype}."
        )
    # OpenMP keeps a count for each thread that calls it; in a new one, torch sets its own only when it is asked for it.
    torch.get_num_threads()
    getattr(cpp, kernel)(*args, (_DTYPES[dtype], level))


def rows(x: Tensor) -> tuple[int, int]:
    """How many rows x (..., N) has, and N."""
    cols = x.shape[-1]
    return x.numel() // cols if cols else x.shape[:-1].numel(), cols


def run_cuda(kernel: str, x: Tensor, *args) -> None:
    """Queue a function of the CUDA extension for tensors like x, on torch's current stream of their GPU."""
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    getattr(cuda, kernel)(*args, (_CUDA_DTYPES[x.dtype], stream))


def aligned(tensor: Tensor) -> Tensor:
    """A tensor as a CUDA kernel takes one: contiguous, from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


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


# What malloc maps anew each time, and hands back as soon as it is free.
_MAPPED = 32 << 20


def fresh(tensor: Tensor) -> Tensor:
    """`tensor`, not yet written, as a kernel's result: a large one on huge pages, since the system brings small ones
    one by one as they are first written to, in several times the time that many kernels take."""
    return prefer_huge_pages(tensor) if tensor.nbytes >= _MAPPED else tensor


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


def cuda_refusals(x: Tensor, since: tuple[int, int] = (8, 0)) -> list[str]:
    """Why no CUDA kernel that needs a compute capability can run a tensor like x."""
    reasons = {
        "vlcore was built without its CUDA extension": cuda is None,
        "it runs on a GPU only": not x.is_cuda,
        "it computes in float32, bfloat16 and float16 only": x.dtype not in _CUDA_DTYPES,
    }
    if any(reasons.values()):
        return [reason for reason, applies in reasons.items() if applies]
    # A graph that is being compiled looks it up itself, and keeps it.
    given = (_look_up_capability if torch.compiler.is_compiling() else _capability)(x.device.index)
    if given < since:
        return [f"it needs compute capability {since[0]}.{since[1]}, and this GPU has {given[0]}.{given[1]}"]
    if not has_code(cuda.architectures, given):
        return [f"this build has code for {cuda.architectures}, and the GPU's is {given[0]}.{given[1]}"]
    return []


def _look_up_capability(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor


# Of a GPU by its number; looking it up takes as long as a kernel does.
_capability = cache(_look_up_capability)


def has_code(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for architectures such as "80;90a" runs on a GPU: that of 80 does on 8.6, and that of 90a on 9.0."""
    major, minor = capability
    exact = f"{major}{minor}a"
    older = [f"{major}{step}" for step in range(minor + 1)]
    return any(name == exact or name in older for name in architectures.split(";"))


def triton(operator: str, launcher: str) -> Callable:
    """The launcher in kernels/<operator>.py, imported when first called: Triton is optional, and slow to import."""

    @cache
    def found() -> Callable:
        replay = import_module("vlcore.kernels.replay")
        return replay.remembered(getattr(import_module(f"vlcore.kernels.{operator}"), launcher))

    def launch(*args):
        return found()(*args)

    return launch
