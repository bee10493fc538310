"""pytest-benchmark over the benches: `pytest bench/bench_swiglu.py`, or `pytest bench` for every operator.

Each case is a group, in which our backends stand beside the peers; one that is not as accurate as torch is not timed.
It takes --benchmark-* as usual, and --device and --dtype. `vlcore bench` is what the README's numbers are measured by:
there all take turns, and a GPU's own time is told from the host's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlcore.bench import command
from vlcore.bench.dtypes import DTYPES, check_dtypes, computing_in
from vlcore.bench.harness import Case, Maker, contenders, prepared


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vlcore")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--dtype", default="bfloat16", choices=tuple(DTYPES))
    group.addoption("--compiled", action="store_true", help="torch.compile among the peers")


def pytest_configure(config: pytest.Config) -> None:
    try:
        check_dtypes([config.option.dtype], config.option.device)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.parent == Path(__file__).parent and file_path.stem.removeprefix("bench_") in command.benched():
        return Bench.from_parent(parent, path=file_path)
    return None


class Bench(pytest.File):
    """A bench_<operator>.py; each of its cases with each backend and peer is a benchmark."""

    def collect(self) -> Iterator[pytest.Item]:
        option = self.config.option
        for case in command.cases(self.path.stem.removeprefix("bench_")):
            for name in (*case.backends(option.device), *contenders(case, option.device, option.compiled)):
                name_of_item = f"{case.title}, {case.shape}: {name}"
                yield pytest.Function.from_parent(self, name=name_of_item, callobj=_benchmark(case, name))


def _benchmark(case: Case, name: str) -> Callable:
    def run(benchmark: Any, pytestconfig: pytest.Config) -> None:
        option = pytestconfig.option
        benchmark.group = f"{case.title}, {case.shape}, {option.dtype}"
        with computing_in(option.dtype):
            benchmark(prepared(case, Maker(DTYPES[option.dtype], option.device), name))

    return run
