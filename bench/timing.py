"""Timing functions against each other, what they need of memory, and what the machine could do at best.

Functions take turns, so that whatever else the machine does falls on all of them. Two clocks:
- `waited`: what a caller waits, from the call to the end of its work. For everything on a CPU, and for whole models on
  a GPU, whose host time is part of what a user gets.
- `computed`: what a GPU computes, by CUDA events, with nothing of the call left in its L2 cache. The device is kept
  busy until the host has queued the whole call, so that neither our launches' cost nor a peer's is in it: it hides in
  a model's queue, and bench/overhead.py measures it by itself. Kernels are launched plainly, not from a graph.
"""

import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

Functions = Mapping[str, Callable[[], object]]

WARM_UP = 2
# A slow function is timed a few times, a fast one until this has passed, in turns of this length each: a turn of one
# fast call would mostly show what the others did to the caches and the threads.
SECONDS, FEWEST, MOST = 1.0, 3, 50
TURN = 0.01
# A GPU has nothing else to do, so that less time shows as much. Each call is a turn of its own there.
GPU_SECONDS, GPU_MOST = 0.1, 100
# Calls of which only the host's part is timed: fewer than a GPU's queue holds.
CALLS, CALLED_TURNS = 50, 200
# More than any GPU's L2 cache.
FLUSHED = 2**28
MOST_FLUSHES = 200


class Spread(NamedTuple):
    """Seconds of a call: the median, and the quartiles below and above it."""

    median: float
    low: float
    high: float


def spread(times: list[float]) -> Spread:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return Spread(median, low, high)


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


def waited(functions: Functions, device: str) -> dict[str, Spread]:
    """Seconds from a call of each function to the end of its work."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(WARM_UP):
        once = {name: _time(function, device) for name, function in functions.items()}
    calls = {name: max(1, min(int(TURN / time), MOST)) for name, time in once.items()}
    turn = sum(calls[name] * time for name, time in once.items())
    for _ in range(min(max(int(SECONDS * len(functions) / turn), FEWEST), MOST)):
        for name, function in functions.items():
            seconds[name].append(_time(function, device, calls[name]) / calls[name])
    return {name: spread(times) for name, times in seconds.items()}


def _time(function: Callable[[], object], device: str, calls: int = 1) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def computed(functions: Functions) -> dict[str, Spread]:
    """Seconds that the GPU spends on a call of each function, from its first kernel to its last."""
    flushed = torch.ones(FLUSHED // 4, device="cuda")
    for _ in range(WARM_UP):
        once = {name: _time(function, "cuda") for name, function in functions.items()}
    queued = {name: _queueing(function) for name, function in functions.items()}
    flush = min(_between_events(flushed.sum) for _ in range(FEWEST))
    # Half as much again: the host may be slower another time.
    flushes = {name: min(math.ceil(1.5 * time / flush) + 1, MOST_FLUSHES) for name, time in queued.items()}
    turn = sum(once[name] + flushes[name] * flush for name in functions)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(min(max(int(GPU_SECONDS * len(functions) / turn), FEWEST), GPU_MOST)):
        for name, function in functions.items():
            # Reading leaves the cache full of what may just be dropped; what was written would be written back first.
            for _ in range(flushes[name]):
                flushed.sum()
            seconds[name].append(_between_events(function))
    return {name: spread(times) for name, times in seconds.items()}


def _queueing(function: Callable[[], object]) -> float:
    """Seconds that the host takes to queue a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    return queued


def _between_events(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def called(functions: Functions, device: str) -> dict[str, Spread]:
    """Seconds that the host spends on a call of each function, whose work a GPU need not have done by then."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(WARM_UP + CALLED_TURNS):
        for name, function in functions.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            if turn >= WARM_UP:
                seconds[name].append((time.perf_counter() - start) / CALLS)
    return {name: spread(times) for name, times in seconds.items()}


def working_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes that `function` needs at most while it runs; None where the system does not tell.

    On a CPU what this process grows by, on a GPU what torch allocates.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
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
    flops = 2 * size**3 / min(_time(lambda: F.linear(a, b), device) for _ in range(FEWEST))
    data = torch.ones(length, device=device)
    return Roofline(flops, 4 * length / min(_time(data.sum, device) for _ in range(FEWEST)))
