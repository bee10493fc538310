"""The compiled extensions, None where this build has none, and Triton's launchers."""

from collections.abc import Callable
from importlib import import_module

from torch import Tensor


def _load(name: str):
    try:
        return import_module(f"vlcore.{name}")
    except ModuleNotFoundError:
        return None


cpp = _load("_C")
cuda = _load("_cuda")


def call(function, *args) -> None:
    """Call a compiled function; tensors go to it as their addresses."""
    function(*(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args))


def triton(operator: str, launcher: str) -> Callable:
    """The launcher in kernels/<operator>.py, imported when first called: Triton is optional, and slow to import."""

    def launch(*args):
        return getattr(import_module(f"vlcore.kernels.{operator}"), launcher)(*args)

    return launch
