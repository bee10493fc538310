"""Trying how a Triton kernel is launched: whether it compiles, what it takes on this GPU, and whether it is right."""

import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from importlib import import_module

import torch

from vlcore.bench import harness, timing
from vlcore.bench.ahead_of_time import compiled
from vlcore.bench.dtypes import DTYPES, TF32, computing_in
from vlcore.bench.gpu_cases import gpu_cases
from vlcore.bench.harness import Case, Maker
from vlcore.bench.launches import Entry, Tried, watched
from vlcore.bench.stand_in import Driver, in_place_of_a_gpu
from vlcore.kernels import launch

Settings = dict[str, int]

# Calls that a kernel is timed over, and reads of FLUSHED bytes before each: meanwhile the host queues the call.
CALLS, FLUSHES = 15, 20
# float16 is launched as bfloat16 is.
DTYPES_TRIED = ("bfloat16", "float32", TF32)
# Seconds for a round of compilations; what takes longer is not tried.
PATIENCE = 60


@dataclass(frozen=True)
class Trial:
    """What the search asks of a GPU about the settings of one entry.

    Attributes:
        usable: of some settings, those that compile and spill nothing.
        seconds: of the kernel, on each input; infinite where it cannot be launched.
        right: whether the operator is as accurate as torch with them.
    """

    usable: Callable[[list[Settings]], list[Settings]]
    seconds: Callable[[Settings], list[float]]
    right: Callable[[Settings], bool]


@dataclass(frozen=True)
class Run:
    """One of an operator's inputs in one dtype."""

    operator: str
    place: int
    dtype: str

    @property
    def case(self) -> Case:
        return gpu_cases(self.operator)[self.place]

    def inputs(self) -> tuple:
        torch.manual_seed(0)
        inputs = self.case.inputs(Maker(DTYPES[self.dtype], "cuda"))
        return inputs if isinstance(inputs, tuple) else inputs[0]

    def call(self, inputs: tuple) -> None:
        with computing_in(self.dtype):
            harness.values(self.case, self.case.on("triton"), inputs)

    def check(self, inputs: tuple) -> None:
        with computing_in(self.dtype):
            harness.check(self.case, inputs, ["triton"])


def reached(operators: Sequence[str], pool: Executor) -> dict[Entry, list[Run]]:
    """By entry of this GPU's tables, in their order, the runs that launch a kernel with it."""
    runs = [
        Run(operator, place, dtype)
        for operator in operators
        if "triton" in import_module(f"vlcore.ops.{operator}").KERNELS
        for place in range(len(gpu_cases(operator)))
        for dtype in DTYPES_TRIED
    ]
    here = launch.architecture(torch.cuda.current_device()), _capability()
    launched = [pool.submit(spills, run, *here) for run in runs]
    by_entry: dict[Entry, list[Run]] = {}
    for run, entries in zip(runs, launched, strict=True):
        for entry in entries.result():
            by_entry.setdefault(entry, []).append(run)
    return {entry: by_entry[entry] for entry in sorted(by_entry, key=_order)}


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _order(entry: Entry) -> tuple:
    return entry.operator, list(launch.table(entry.operator)).index(entry.kernel), entry.index


def spills(run: Run, architecture: str, capability: int, tried: Tried | None = None) -> dict[Entry, int]:
    """How many registers spill what a run launches with each entry of a table; compiles it, for which no GPU is needed,
    into Triton's cache on disk."""
    with in_place_of_a_gpu(Driver(capability), architecture):
        records = compiled(run.case, run.dtype, tried)
    found: dict[Entry, int] = {}
    for record in records:
        if record["table"]:
            operator, _, kernel = record["table"].partition(".")
            entry = Entry(operator, kernel, architecture, record["entry"])
            found[entry] = max(found.get(entry, 0), record["spills"])
    return found


def on_this_gpu(entry: Entry, runs: Sequence[Run], pool: Executor) -> Trial:
    """Trials of an entry by the runs that reach it; compilations go to the pool, and into Triton's cache on disk."""
    inputs = [run.inputs() for run in runs]
    here = entry.architecture, _capability()

    def usable(candidates: list[Settings]) -> list[Settings]:
        futures = [[pool.submit(spills, run, *here, {entry: settings}) for run in runs] for settings in candidates]
        wait([future for each in futures for future in each], PATIENCE)
        fine = [all(_found(future).get(entry) == 0 for future in each) for each in futures]
        return [settings for settings, is_fine in zip(candidates, fine, strict=True) if is_fine]

    def seconds(settings: Settings) -> list[float]:
        from triton.runtime.errors import OutOfResources

        try:
            return [_kernel_seconds(entry, settings, *each) for each in zip(runs, inputs, strict=True)]
        except OutOfResources:
            return [math.inf] * len(runs)

    def right(settings: Settings) -> bool:
        try:
            with watched(lambda kernel, entry, go: go(), {entry: settings}):
                for run, given in zip(runs, inputs, strict=True):
                    run.check(given)
        except AssertionError:
            return False
        return True

    return Trial(usable, seconds, right)


def _found(future: Future) -> dict[Entry, int]:
    """What `spills` gave; nothing where it was not done in time, or the compiler refused."""
    return {} if future.cancel() or not future.done() or future.exception() else future.result()


def _kernel_seconds(entry: Entry, settings: Settings, run: Run, inputs: tuple) -> float:
    """The median time that a call spends in the kernels launched with an entry, by events around each."""
    around: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch(kernel: str, used: Entry | None, go: Callable) -> object:
        if used != entry:
            return go()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launched = go()
        end.record()
        around.append((start, end))
        return launched

    flushed = torch.ones(timing.FLUSHED // 4, device="cuda")
    times = []
    with watched(watch, {entry: settings}):
        run.call(inputs)
        for _ in range(CALLS):
            torch.cuda.synchronize()
            around.clear()
            for _ in range(FLUSHES):
                flushed.sum()
            run.call(inputs)
            torch.cuda.synchronize()
            times.append(sum(start.elapsed_time(end) for start, end in around) / 1e3)
    return statistics.median(times)
