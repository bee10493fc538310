"""Timing functions against each other, what they need of memory, and what the machine could do at best."""

import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

WARM_UP = 2
# A slow function is timed a few times, a fast one until this has passed, in turns of this length each: a turn of one
# fast call would mostly show what the others did to the caches and the threads.
SECONDS, FEWEST, MOST = 1.0, 3, 50
TURN = 0.01


def machine(device: str) -> str:
    """What numbers on "cpu" or "cuda" are measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as info:
            name = next((line.split(": ", 1)[1].strip() for line in info if line.startswith("model name")), name)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {instructions}, torch {torch.__version__}"


def medians(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each function: they take turns, so that whatever else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(WARM_UP):
        once = {name: _time(function) for name, function in functions.items()}
    calls = {name: max(1, min(int(TURN / time), MOST)) for name, time in once.items()}
    turn = sum(calls[name] * time for name, time in once.items())
    for _ in range(min(max(int(SECONDS * len(functions) / turn), FEWEST), MOST)):
        for name, function in functions.items():
            seconds[name].append(_time(function, calls[name]) / calls[name])
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}


def _time(function: Callable[[], object], calls: int = 1) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def working_memory(function: Callable[[], object]) -> int | None:
    """Bytes by which this process grows at most while `function` runs; None where the system does not tell."""
    if platform.system() != "Linux":
        return None
    # What was freed before goes back to the system, so that it cannot hide what is allocated now.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = _memory("VmRSS")
    function()
    return _memory("VmHWM") - before


def _memory(what: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


class Roofline(NamedTuple):
    """FLOP/s of a large matrix product, and bytes/s of a large read, both as torch reaches them here."""

    flops: float
    bandwidth: float


def roofline(dtype: torch.dtype, device: str) -> Roofline:
    """The best of a few tries: what else the machine does can only make it look slower."""
    size, length = (4096, 2**28) if device == "cpu" else (8192, 2**30)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / min(_time(lambda: F.linear(a, b)) for _ in range(FEWEST))
    data = torch.ones(length, device=device)
    return Roofline(flops, 4 * length / min(_time(data.sum) for _ in range(FEWEST)))
