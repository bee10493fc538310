"""How Triton kernels are launched, searched for on this GPU and written to kernels/<operator>.json.

`python -m vlcore.bench.tune [OP...] [--minutes N]` goes through the entries of this GPU's tables: first those that the
benches reach in bfloat16, of the operators in the order given, until the time is over. An entry's neighbours, a step
away in one setting, or in a block and the warps at once, are compiled on all cores and timed on the inputs that reach
the entry; it moves to the best one if that is faster by GAIN and right, and looks again.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path

import torch

from vlcore.bench.command import benched
from vlcore.bench.launches import Entry
from vlcore.bench.trials import Settings, Trial, compile_benched, on_this_gpu, reached
from vlcore.kernels import launch

# Where a model's time goes on a GPU comes before the others.
FIRST = (
    "rel_pos_attention",
    "rope_attention",
    "window_attention",
    "attention",
    "hybrid_adaptor",
    "downsample_features",
)
# What a change has to be faster by, beyond what differs from run to run.
GAIN = 0.03
# Seconds that an entry is searched for at least, and the part of them that its neighbours may take to compile.
LEAST, COMPILING = 20.0, 0.7
# The least and the most of the settings that are searched, besides blocks; what else a table holds is left as it is.
LIMITS = {
    "num_warps": (1, 16),
    "num_stages": (1, 7),
    "STAGES": (1, 7),
    "PROGRAMS": (1, 4096),
    "SPLITS": (1, 64),
    "INTERPOLATE": (0, 1),
}
BLOCK_LIMITS = (1, 8192)
# These go by one, all others are halved and doubled.
BY_ONE = {"num_stages", "STAGES", "INTERPOLATE"}


def neighbours(settings: Settings) -> list[Settings]:
    """What is one step away: warps and stages first, which compile alike."""
    names = sorted(settings, key=lambda name: (name.isupper(), name))
    steps = {name: _steps(name, settings[name]) for name in names}
    single = [settings | {name: value} for name in names for value in steps[name].values()]
    both = [
        settings | {name: steps[name][way], "num_warps": steps["num_warps"][way]}
        for name in names
        for way in ("down", "up")
        if name.startswith("BLOCK") and way in steps[name] and way in steps["num_warps"]
    ]
    return single + both


def _steps(name: str, value: int) -> dict[str, int]:
    if name not in LIMITS and not name.startswith("BLOCK"):
        return {}
    least, most = LIMITS.get(name, BLOCK_LIMITS)
    down, up = (value - 1, value + 1) if name in BY_ONE else (value // 2, value * 2)
    return {way: value for way, value in (("down", down), ("up", up)) if least <= value <= most}


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """How long the ones take of the others' time, the geometric mean over the inputs."""
    if math.inf in seconds or math.inf in others:
        return math.inf if math.inf in seconds else 0.0
    logarithms = [math.log(ours / theirs) for ours, theirs in zip(seconds, others, strict=True)]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def improved(settings: Settings, trial: Trial, seconds_left: Callable[[], float]) -> Settings:
    """The settings that the search ends with: where no neighbour is faster, or when the time is over."""
    seen = [settings]
    while seconds_left() > 0:
        fresh = [near for near in neighbours(settings) if near not in seen]
        seen += fresh
        present = trial.seconds(settings)
        ratios = []
        for near in trial.usable(fresh, COMPILING * seconds_left()):
            if seconds_left() <= 0:
                break
            ratios.append((ratio(trial.seconds(near), present), near))
        # Equal times keep the order of `neighbours`.
        for found, near in sorted(ratios, key=lambda pair: pair[0]):
            if found > 1 - GAIN:
                return settings
            if ratio(trial.seconds(near), trial.seconds(settings)) <= 1 - GAIN and trial.right(near):
                settings = near
                break
        else:
            return settings
    return settings


def write(path: Path, table: dict) -> None:
    """A launch table, an entry a line; at no time is there half a file."""
    kernels = []
    for kernel, architectures in table.items():
        lists = ",\n".join(
            f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(entry)}" for entry in entries) + "\n    ]"
            for name, entries in architectures.items()
        )
        kernels.append(f"  {json.dumps(kernel)}: {{\n{lists}\n  }}")
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        file.write("{\n" + ",\n".join(kernels) + "\n}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def tuned(
    entries: Mapping[Entry, Callable[[], Trial]],
    folder: Path,
    end: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[str]:
    """Search for each entry in its share of the time until `end`, and write what changed at once; a line of each."""
    for place, (entry, begin) in enumerate(entries.items()):
        left = end - clock()
        if left <= 0:
            yield f"The time is over: {len(entries) - place} entries of {len(entries)} stay as they are"
            return
        over = clock() + min(max(left / (len(entries) - place), LEAST), left)
        before = entry.settings
        trial = begin()
        after = improved(before, trial, lambda: over - clock())  # noqa: B023
        name = f"{entry.operator}.{entry.kernel}, {entry.architecture}[{entry.index}]"
        if after == before:
            yield f"{name} stays {before}"
            continue
        path = folder / f"{entry.operator}.json"
        table = json.loads(path.read_text())
        entries_there = table[entry.kernel][entry.architecture]
        limits = {name: entries_there[entry.index][name] for name in entries_there[entry.index].keys() & {"up_to"}}
        entries_there[entry.index] = limits | after
        gain = 1 - ratio(trial.seconds(after), trial.seconds(before))
        write(path, table)
        launch.table.cache_clear()
        yield f"{name} takes {gain:.0%} less time: {before} -> {after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlcore.bench.tune", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="OP", help="operators of vlcore.ops (default: all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all of it (default: 8)")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    if strays := set(arguments.operators) - set(benched()):
        parser.error(f"There are no operators {sorted(strays)} that have a bench.")
    if not torch.cuda.is_available() or launch.INTERPRETED or not launch.AVAILABLE:
        parser.error("Launches are tuned on a GPU, by Triton and not by its interpreter; this process has none.")
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    try:
        operators = arguments.operators or sorted(benched(), key=lambda name: (*FIRST, name).index(name))
        runs = reached(operators, pool)
        compile_benched({run for its in runs.values() for run in its}, pool)
        trials = {entry: partial(on_this_gpu, entry, its, pool) for entry, its in runs.items()}
        for line in tuned(trials, Path(launch.__file__).parent, end):
            print(line, flush=True)
    finally:
        # Compilations that nobody waits for any more can take a minute.
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in active_children():
            worker.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
