"""Measurements on paper: lines for a terminal, a JSON file that is brought up to date, and the README's tables.

`python -m vlcore.bench.report README.md` writes the tables of bench/results/ into the README.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlcore.bench.dtypes import DTYPES
from vlcore.bench.harness import Measurement
from vlcore.bench.peers import EAGER, OURS
from vlcore.bench.timing import Roofline

RESULTS = Path(__file__).parent / "results"


def line(found: Measurement) -> str:
    """A measurement for a terminal: the time of ours, its rate, and how many times as fast it is as each other."""
    others = (f"{name} {found.ratio(name):.2f}x" for name in found.seconds if name != found.ours)
    time = f"{found.ours} {_time(found.seconds[found.ours])}{_spread(found)}"
    failed = (f"{name} failed: {why}" for name, why in found.failed.items())
    columns = (found.title, found.shape, found.dtype, time, found.rate, _memory(found), *others, *failed)
    return "  ".join(column for column in columns if column)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.{int(seconds < 1e-5)}f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _spread(found: Measurement) -> str:
    low, high = found.quartiles.get(found.ours, (0, 0))
    return f" (from {_time(low)} to {_time(high)})" if high else ""


def _memory(found: Measurement) -> str:
    ours, eager = (found.memory.get(name) for name in (found.ours, EAGER))
    return f"{ours / 2**20:.0f} MiB beside {eager / 2**20:.0f}" if ours and eager else ""


@dataclass
class Results:
    """What was measured on one machine.

    Attributes:
        made_by: the commit and versions, by name.
        tests: how many "passed", "failed" and were "skipped" there.
    """

    machine: str
    measurements: list[Measurement] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)
    tests: dict[str, int] = field(default_factory=dict)

    def add(self, found: Measurement) -> None:
        """Keep a measurement in place of one of the same thing."""
        places = [i for i, other in enumerate(self.measurements) if _what(other) == _what(found)]
        if places:
            self.measurements[places[0]] = found
        else:
            self.measurements.append(found)

    def write(self, path: Path) -> None:
        measurements = [asdict(found) for found in self.measurements]
        for found in measurements:
            found["seconds"] = {name: _rounded(seconds) for name, seconds in found["seconds"].items()}
            found["quartiles"] = {name: [*map(_rounded, two)] for name, two in found["quartiles"].items()}
        whole = {"machine": self.machine, "made_by": self.made_by, "tests": self.tests, "measurements": measurements}
        path.write_text(json.dumps(whole, indent=1) + "\n")


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _what(found: Measurement) -> tuple:
    # Which backend of an operator is the fastest may change; the variants of a model are different things.
    variant = found.ours if found.ours.startswith(OURS) else ""
    return found.operator, found.shape, found.dtype, found.trains, variant


def read(path: Path) -> Results:
    """A file that `Results.write` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        whole = json.loads(path.read_text())
        measurements = [_measurement(entry) for entry in whole["measurements"]]
        return Results(whole["machine"], measurements, whole.get("made_by", {}), whole.get("tests", {}))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of results: {error!r}.") from None


def _measurement(entry: dict[str, Any]) -> Measurement:
    quartiles = {name: tuple(two) for name, two in entry.get("quartiles", {}).items()}
    return Measurement(**entry | {"limit": Roofline(*entry["limit"]), "quartiles": quartiles})


def operator_table(results: Results) -> str:
    """Operators by shape: time, rate and the ratio to the best of the others, in each dtype that was measured."""
    chosen = [found for found in results.measurements if not found.ours.startswith(OURS)]
    dtypes = [dtype for dtype in DTYPES if any(found.dtype == dtype for found in chosen)]
    lines = [f"| operator | shape | {' | '.join(dtypes)} |", "|---|---|" + "---|" * len(dtypes)]
    for title, shape in dict.fromkeys((found.title, found.shape) for found in chosen):
        cells = []
        for dtype in dtypes:
            same = [f for f in chosen if (f.title, f.shape, f.dtype) == (title, shape, dtype)]
            cells.append(_cell(same[0]) if same else "not measured")
        lines.append(f"| {title} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Measurement) -> str:
    peer = f"**{found.ratio(found.best_peer):.2f}×** {found.best_peer}"
    return ", ".join(part for part in (_time(found.seconds[found.ours]), found.rate, peer) if part)


def model_table(results: Results) -> str:
    """Models end to end: time, rate, and the ratio to each of the others."""
    chosen = [found for found in results.measurements if found.ours.startswith(OURS)]
    lines = ["| what | with | time | rate | times as fast as | memory |", "|---|---|---|---|---|---|"]
    for found in chosen:
        peers = (f"{name} **{found.ratio(name):.2f}×**" for name in found.seconds if name != found.ours)
        with_what = f"{found.ours.removeprefix(OURS).removeprefix(', ') or found.dtype}"
        what = f"{found.operator}, {found.shape}"
        cells = (what, with_what, _time(found.seconds[found.ours]), found.rate, ", ".join(peers), _memory(found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Results], str]] = {"operators": operator_table, "models": model_table}


def _origin(results: Results) -> str:
    """The machine, the commits that were measured, and how the tests of the last went there."""
    commits = dict.fromkeys(found.commit for found in results.measurements if found.commit)
    commit = f", of {' and '.join(commits)}" if commits else ""
    tests = "; tests: " + ", ".join(f"{count} {how}" for how, count in results.tests.items()) if results.tests else ""
    return f"{results.machine}{commit}{tests}:"


def with_tables(text: str, folder: Path = RESULTS) -> str:
    """`text` with each table between its marks, such as <!-- cpu operators --> and <!-- end -->, made anew.

    cpu.json is between the marks of "cpu", and that of another kind of CPU, such as cpu_amx.json, between those of "cpu
    amx". Between the marks of "cuda" are the tables of every GPU whose results are in the folder, each below its name.

    Raises:
        ValueError: there are results whose marks are missing.
    """
    # What `make gpu-code` found is no measurement.
    paths = [path for path in sorted(folder.glob("*.json")) if path.stem != "gpu_code"]
    cpus = {path.stem: [read(path)] for path in paths if path.stem.startswith("cpu")}
    gpus = [read(path) for path in paths if path.stem not in cpus]
    for name, table in TABLES.items():
        for cpu, measured in {"cpu": [], **cpus}.items():
            text = _between(text, f"<!-- {cpu.replace('_', ' ')} {name} -->", [table(results) for results in measured])
        text = _between(text, f"<!-- cuda {name} -->", [f"{_origin(results)}\n\n{table(results)}" for results in gpus])
    return text


def _between(text: str, mark: str, tables: list[str]) -> str:
    before, found, rest = text.partition(f"{mark}\n")
    _, closed, after = rest.partition("<!-- end -->")
    if found and closed:
        whole = "\n\n".join(tables) or "Not measured yet."
        return f"{before}{mark}\n{whole}\n{closed}{after}"
    if tables:
        raise ValueError(f"The text has no {mark} ... <!-- end --> for what was measured.")
    return text


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_tables(readme.read_text()))
