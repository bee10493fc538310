"""Timing functions against each other: one process, taking turns, medians."""

import platform
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3


def machine() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as info:
            name = next((line.split(": ", 1)[1].strip() for line in info if line.startswith("model name")), name)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {instructions}, torch {torch.__version__}"


def medians(functions: Mapping[str, Callable], *arguments, repeats: int = 50) -> dict[str, float]:
    """Seconds of each function: they take turns, so that whatever else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(WARM_UP + repeats):
        for name, function in functions.items():
            _wait()
            start = time.perf_counter()
            function(*arguments)
            _wait()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
