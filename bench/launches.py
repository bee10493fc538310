"""Watching the launches of Triton kernels: which entry of which launch table each is made with."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

from vlcore import native
from vlcore.kernels import launch


@dataclass(frozen=True)
class Entry:
    """One entry of kernels/<operator>.json: of a kernel, on an architecture, by its place in the list."""

    operator: str
    kernel: str
    architecture: str
    index: int

    @property
    def settings(self) -> dict[str, int]:
        entry = launch.table(self.operator)[self.kernel][self.architecture][self.index]
        return {name: value for name, value in entry.items() if name != "up_to"}


# Called in place of a launch with the kernel's name, the entry that it is launched with (None: no table says how), and
# what launches, or with warmup=True only compiles, and returns the compiled kernel.
Watcher = Callable[[str, Entry | None, Callable[..., Any]], Any]

# Settings instead of those that entries hold.
Tried = Mapping[Entry, dict[str, int]]


@contextmanager
def watched(watcher: Watcher, tried: Tried | None = None) -> Iterator[None]:
    """Within it, `watcher` is called at every launch, and an entry is taken as `tried` gives it where it does."""
    from triton.runtime.jit import JITFunction

    # What launches kernels directly has to have seen Triton's own way before another is in its place.
    import_module("vlcore.kernels.direct_launch")

    asked: list[tuple[Entry, dict[str, int]]] = []
    run = JITFunction.run

    def note(operator: str, kernel: str, architecture: str, sizes: tuple) -> dict[str, int]:
        entry = Entry(operator, kernel, architecture, launch.first_that_fits(operator, kernel, architecture, sizes))
        settings = (tried or {}).get(entry) or entry.settings
        asked.append((entry, settings))
        return settings

    def watch(kernel, *arguments, grid, warmup, **options):
        def go(warmup: bool = False):
            return run(kernel, *arguments, grid=grid, warmup=warmup, **options)

        name = kernel.fn.__name__
        return watcher(name, _entry(asked, name, options), go)

    _forget()
    try:
        with patch.object(launch, "look_up", note), patch.object(JITFunction, "run", watch):
            yield
    finally:
        _forget()


def _forget() -> None:
    """What launchers have cached that may follow from settings."""
    native.Kinds.forget()
    for name in [name for name in sys.modules if name.startswith("vlcore.kernels.")]:
        for value in list(vars(sys.modules[name]).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _entry(asked: list[tuple[Entry, dict[str, int]]], kernel: str, options: dict) -> Entry | None:
    """Of the entries that were asked for, the one that a launch with these options was made with: of a table that bears
    the kernel's name if there is one, agreeing with the options in most, since a launcher may narrow a block, and of
    several the last. Warps and stages are always as they were asked for."""

    def disagreements(settings: dict[str, int]) -> set[str]:
        return {name for name in settings.keys() & options.keys() if settings[name] != options[name]}

    fitting = [
        (entry.kernel not in kernel, len(disagreements(settings)), entry)
        for entry, settings in reversed(asked)
        if settings.keys() & options.keys() and not disagreements(settings) & {"num_warps", "num_stages"}
    ]
    return min(fitting, key=lambda found: found[:2])[2] if fitting else None
