"""Launches of Triton's kernels without a GPU or a compiler: what launchers are called with is noted."""

import itertools
from types import SimpleNamespace

from triton.runtime import driver as drivers

from vlcore.bench.stand_in import Driver

_NUMBERS = itertools.count(1)
# Of a launch: grid, stream, function, metadata and hooks; what the kernel is given stands behind them.
ARGUMENTS_BEFORE = 9


class Recorder(Driver):
    """Each kernel that is loaded is a function of its own."""

    def __init__(self) -> None:
        super().__init__(90, lambda *arguments: self.launches.append(arguments))
        self.launches: list[tuple] = []

    def load_binary(self, name, kernel, shared, device):
        return 1, next(_NUMBERS), 32, 0, 1024


def compile_nothing(kernel, key, *others, **more) -> SimpleNamespace:
    """In place of JITFunction._do_compile: something that is launched as its result is, another for each key."""
    cache = kernel.device_caches[drivers.active.get_current_device()][0]
    cache[key] = SimpleNamespace(
        run=lambda *arguments: drivers.active.launched(*arguments),
        function=f"{kernel.fn.__name__} {next(_NUMBERS)}",
        packed_metadata=None,
        launch_metadata=lambda *arguments: None,
    )
    return cache[key]
