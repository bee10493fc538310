"""`vlcore bench`: operators at DeepSeek-VL's shapes, or whole models, beside what a user would run instead."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from traceback import print_exception

import torch

from vlcore.bench import harness
from vlcore.bench.dtypes import DTYPES, check_dtypes, computing_in
from vlcore.bench.harness import Case, Maker, Measurement
from vlcore.bench.peers import operators
from vlcore.bench.plot import check_file, draw
from vlcore.bench.report import Results, line, read
from vlcore.bench.timing import machine, roofline

# Part of a model -> the module and function that yields its cases.
MODELS = {
    "vision": ("models", "vision"),
    "prefill": ("models", "prefill"),
    "decode": ("decoding", "decode"),
    "train": ("training", "train"),
}
# What the models' peers are made with; an operator's are left out where they are not installed.
PEERS = ("transformers", "accelerate")


def benched() -> list[str]:
    """The operators that have a bench."""
    return [name for name in operators() if find_spec(f"vlcore.bench.bench_{name}")]


def cases(operator: str) -> Sequence[Case]:
    """The comparisons of an operator."""
    return import_module(f"vlcore.bench.bench_{operator}").CASES


def run(
    names: Sequence[str],
    parts: Sequence[str],
    *,
    device: str,
    dtypes: Sequence[str] = (),
    overhead: bool = False,
    compiled: bool = True,
    json_file: Path | None = None,
    plot_file: Path | None = None,
) -> None:
    """Measure and print, a line each; write to `json_file` as results come.

    Args:
        names: operators; all that have a bench where nothing else is asked for.
        parts: of MODELS.
        device: "cpu" or "cuda".
        dtypes: of DTYPES, TF32 on GPUs only; by default bfloat16, and for operators float32 too.
        overhead: whether what calls of operators cost the host is measured.
        compiled: whether torch.compile is one of the peers, which takes minutes.
        json_file: where results are added; it holds one machine's only.
        plot_file: where a picture of them is drawn, of all that json_file holds if it is given.

    Raises:
        ValueError: an operator without a bench, a device that is not there, a file of another machine, a plot without
            matplotlib or that cannot be written, or a model without transformers.
        AssertionError: results are not as accurate as torch's, or were none. They are not timed; all the others are.
    """
    for name in names:
        if name not in benched():
            raise ValueError(f"There is no bench of {name!r}; there are {', '.join(benched())}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here that torch can use.")
    check_dtypes(dtypes, device)
    here = machine(device)
    kept = read(json_file) if json_file and json_file.exists() else Results(here)
    if kept.machine != here:
        raise ValueError(f"{json_file} holds what was measured on {kept.machine!r}; this is {here!r}.")
    if plot_file and find_spec("matplotlib") is None:
        raise ValueError("A plot needs matplotlib: pip install 'vlcore[plot]'.")
    if plot_file:
        check_file(plot_file)
    if parts and (missing := [package for package in PEERS if find_spec(package) is None]):
        given = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise ValueError(f"Models are timed beside transformers', and {given}: pip install 'vlcore[bench]'.")
    print(here, flush=True)
    chosen = names or ([] if parts or overhead else benched())
    failed: list[str] = []
    for dtype in dtypes or (("bfloat16", "float32") if chosen else ("bfloat16",)):
        with computing_in(dtype):
            limit = roofline(DTYPES[dtype], device)
            print(f"{dtype}: {limit.flops / 1e9:.0f} GFLOP/s, {limit.bandwidth / 1e9:.1f} GB/s at best", flush=True)
            results = chain(
                _overhead(DTYPES[dtype], device) if overhead else (),
                _operators(chosen, dtype, device, compiled, failed),
                _models(parts, dtype, device, compiled, failed),
            )
            for found in results:
                found = replace(found, limit=limit, dtype=dtype)
                print(line(found), flush=True)
                kept.add(found)
                if json_file:
                    kept.write(json_file)
    if plot_file:
        draw(kept, plot_file)
    if failed:
        raise AssertionError(f"Not timed: {'; '.join(failed)}.")


@contextmanager
def _noted(what: str, failed: list[str]) -> Iterator[None]:
    """What fails stops nothing else: a GPU is lent for minutes."""
    try:
        yield
    except Exception as error:
        print_exception(error)
        failed.append(f"{what}: {error}")


def _overhead(dtype: torch.dtype, device: str) -> Iterator[Measurement]:
    # It takes its cases from here.
    yield from import_module("vlcore.bench.overhead").overhead(dtype, device)


def _operators(
    names: Sequence[str], dtype: str, device: str, compiled: bool, failed: list[str]
) -> Iterator[Measurement]:
    for name in names:
        for case in cases(name):
            with _noted(f"{case.title}, {case.shape}, {dtype}", failed):
                yield harness.measure(case, Maker(DTYPES[dtype], device), compiled)


def _models(parts: Sequence[str], dtype: str, device: str, compiled: bool, failed: list[str]) -> Iterator[Measurement]:
    for part in parts:
        with _noted(f"{part}, {dtype}", failed):
            yield from _model(part, dtype, device, compiled)


def _model(part: str, dtype: str, device: str, compiled: bool) -> Iterator[Measurement]:
    # By itself, so that nothing holds a part's models when the next one's are made.
    from vlcore.bench import models

    module, function = MODELS[part]
    make: Callable[..., Iterator] = getattr(import_module(f"vlcore.bench.{module}"), function)
    for case in make(DTYPES[dtype], device, compiled):
        yield from models.measure(case, DTYPES[dtype], device)
