"""SIGTERM and Ctrl-C end a run behind a step, with a checkpoint; a second one ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one does what it did before.

    Signals that are ignored, or that whoever calls us handles, are left alone, and so are all outside of the main
    thread, where Python lets none be handled.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread() and self.received is None:
            for number in SIGNALS:
                if signal.getsignal(number) in DEFAULTS:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """For what may take long and loses nothing: a signal ends it at once."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
