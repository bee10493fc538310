"""Trying how a Triton kernel is launched: whether it compiles, what it takes on this GPU, and whether it is right."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from importlib import import_module

import torch

from vlcore.bench import harness, timing
from vlcore.bench.ahead_of_time import called, compiled
from vlcore.bench.command import cases
from vlcore.bench.dtypes import DTYPES, TF32, computing_in
from vlcore.bench.gpu_cases import gpu_cases
from vlcore.bench.harness import Case, Maker
from vlcore.bench.launches import Entry, Tried, watched
from vlcore.bench.stand_in import Driver, in_place_of_a_gpu
from vlcore.kernels import launch

Settings = dict[str, int]

# Calls that a kernel is timed over.
CALLS = 15
# Cycles, a tenth of a millisecond, that a GPU is kept busy for before a kernel that is timed: meanwhile the host queues
# it, even where the launcher has just waited for the GPU.
BUSY = 200_000
# float16 is launched as bfloat16 is.
DTYPES_TRIED = ("bfloat16", "float32", TF32)
# The most seconds for a round of compilations; what takes longer is not tried.
PATIENCE = 60


@dataclass(frozen=True)
class Trial:
    """What the search asks of a GPU about the settings of one entry.

    Attributes:
        usable: of some settings, those that compile within so many seconds and spill nothing.
        seconds: of the kernel, on each input; infinite where it cannot be launched.
        right: whether the operator is as accurate as torch with them.
    """

    usable: Callable[[list[Settings], float], list[Settings]]
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

    @property
    def is_benched(self) -> bool:
        return self.place < len(cases(self.operator))

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
    """By entry of this GPU's tables the runs that launch a kernel with it: the entries that a bench reaches in bfloat16
    first, and otherwise in the order of the operators and of their tables."""
    runs = [
        Run(operator, place, dtype)
        for operator in operators
        if "triton" in import_module(f"vlcore.ops.{operator}").KERNELS
        for place in range(len(gpu_cases(operator)))
        for dtype in DTYPES_TRIED
    ]
    here = _this_gpu()
    launched = [pool.submit(launched_with, run, *here) for run in runs]
    by_entry: dict[Entry, list[Run]] = {}
    for run, entries in zip(runs, launched, strict=True):
        for entry in entries.result():
            by_entry.setdefault(entry, []).append(run)

    def order(entry: Entry) -> tuple:
        is_benched = any(run.dtype == "bfloat16" and run.is_benched for run in by_entry[entry])
        kernel = list(launch.table(entry.operator)).index(entry.kernel)
        return not is_benched, operators.index(by_entry[entry][0].operator), entry.operator, kernel, entry.index

    return {entry: _told_apart(by_entry[entry]) for entry in sorted(by_entry, key=order)}


def compile_benched(runs: Iterable[Run], pool: Executor) -> None:
    """What the benches among the runs launch, on all cores, into Triton's cache on disk: the benches, which are timed
    one after another, find it there."""
    wait([pool.submit(spills, run, *_this_gpu()) for run in runs if run.is_benched], PATIENCE)


def _told_apart(runs: list[Run]) -> list[Run]:
    """Without those in TF32 of what is launched with the same entry in float32: mostly it multiplies nothing."""
    known = {(run.operator, run.place) for run in runs if run.dtype == "float32"}
    return [run for run in runs if run.dtype != TF32 or (run.operator, run.place) not in known]


def _this_gpu() -> tuple[str, int]:
    """The architecture whose tables it is launched by, and its compute capability."""
    major, minor = torch.cuda.get_device_capability()
    return launch.architecture(torch.cuda.current_device()), 10 * major + minor


def launched_with(run: Run, architecture: str, capability: int) -> list[Entry]:
    """The entries that a run launches kernels with; compiles nothing, and needs no GPU."""
    found: list[Entry] = []

    def note(kernel: str, entry: Entry | None, go: Callable) -> None:
        if entry is not None and entry not in found:
            found.append(entry)

    with in_place_of_a_gpu(Driver(capability), architecture):
        called(run.case, run.dtype, note)
    return found


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
    here = _this_gpu()

    def usable(candidates: list[Settings], patience: float) -> list[Settings]:
        futures = [[pool.submit(spills, run, *here, {entry: settings}) for run in runs] for settings in candidates]
        wait([future for each in futures for future in each], min(patience, PATIENCE))
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
        torch.cuda._sleep(BUSY)
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
            flushed.sum()
            run.call(inputs)
            torch.cuda.synchronize()
            times.append(sum(start.elapsed_time(end) for start, end in around) / 1e3)
    return statistics.median(times)
