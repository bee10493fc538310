"""A GPU's driver that is not there: Triton compiles for it and launches, and nothing runs.

With it the host's part of a launch can be measured and tested on any machine, and kernels be compiled for any GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from vlcore import native
from vlcore.kernels import launch

# What Triton asks of a GPU before it loads a kernel, of an H100.
PROPERTIES = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Driver:
    """What Triton asks a driver.

    Attributes:
        device, stream: the current ones.
        launched: called in place of a launch, with what Triton's own launcher is called with.
    """

    def __init__(self, capability: int, launched: Callable[..., None] | None = None) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.device, self.stream = 0, 0
        self.launched = launched or _nothing
        self.utils = self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return self.launched

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads at most."""
        return 1, id(kernel), 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


def _nothing(*arguments: Any) -> None:
    pass


@contextmanager
def in_place_of_a_gpu(driver: Driver, architecture: str) -> Iterator[None]:
    """Triton has this driver, kernels are launched by the tables of an architecture, and they take a CPU's tensors."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver as drivers

    loaded: list[Any] = []
    load = CompiledKernel._init_handles

    def note(kernel: Any) -> None:
        if kernel.module is None:
            loaded.append(kernel)
        load(kernel)

    native.Kinds.forget()
    try:
        with (
            patch.object(CompiledKernel, "_init_handles", note),
            patch.object(drivers, "_active", driver),
            patch.object(launch, "architecture", lambda index: architecture),
            patch.object(launch, "refusals", lambda *tensors: []),
        ):
            yield
    finally:
        native.Kinds.forget()
        for kernel in loaded:
            # Or the driver of that time would be told to unload it.
            kernel.module = None
