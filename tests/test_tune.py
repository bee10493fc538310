"""The search for launch settings, with a clock and a GPU that are made up; what it compiles is compiled for real."""

import json
import math
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vlcore.bench import trials, tune
from vlcore.bench.launches import Entry
from vlcore.bench.trials import Trial
from vlcore.kernels import launch

ROOT = Path(__file__).parent.parent
BEGIN = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}


class Landscape:
    """Times of two inputs that grow with the distance from the best settings, in steps."""

    def __init__(self, *, best=BEGIN, step=0.1, spilling=(), wrong=(), too_large=()):
        self.best, self.step = best, step
        self.spilling, self.wrong, self.too_large = spilling, wrong, too_large
        self.timed = []

    def distance(self, settings) -> float:
        logarithmic = sum(abs(math.log2(settings[name] / self.best[name])) for name in ("BLOCK", "num_warps"))
        return logarithmic + abs(settings["num_stages"] - self.best["num_stages"])

    def seconds(self, settings):
        self.timed.append(settings)
        if settings in self.too_large:
            return [math.inf, math.inf]
        return [time * (1 + self.step) ** self.distance(settings) for time in (1e-3, 5e-5)]

    @property
    def trial(self) -> Trial:
        return Trial(
            usable=lambda some, patience: [settings for settings in some if settings not in self.spilling],
            seconds=self.seconds,
            right=lambda settings: settings not in self.wrong,
        )


def test_neighbours_are_a_step_away():
    assert tune.neighbours({"BLOCK_M": 1, "num_warps": 4, "num_stages": 1}) == [
        {"BLOCK_M": 1, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 1, "num_warps": 2, "num_stages": 1},
        {"BLOCK_M": 1, "num_warps": 8, "num_stages": 1},
        {"BLOCK_M": 2, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 2, "num_warps": 8, "num_stages": 1},
    ]
    assert {"PROGRAMS": 528, "num_warps": 16} in tune.neighbours({"PROGRAMS": 264, "num_warps": 16})
    assert all(near["num_warps"] <= 16 for near in tune.neighbours({"PROGRAMS": 264, "num_warps": 16}))
    assert tune.neighbours({"SEGMENT": 256, "INTERPOLATE": 0, "num_warps": 16}) == [
        {"SEGMENT": 256, "INTERPOLATE": 0, "num_warps": 8},
        {"SEGMENT": 256, "INTERPOLATE": 1, "num_warps": 16},
    ]


@pytest.mark.parametrize(
    "best",
    [
        {"BLOCK": 256, "num_warps": 8, "num_stages": 4},
        {"BLOCK": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK": 8, "num_warps": 1, "num_stages": 1},
    ],
)
def test_finds_the_best(best):
    assert tune.improved(BEGIN, Landscape(best=best).trial, lambda: math.inf) == best


def test_what_is_hardly_faster_is_not_worth_a_change():
    best = BEGIN | {"num_stages": 4}
    assert tune.improved(BEGIN, Landscape(best=best, step=0.02).trial, lambda: math.inf) == BEGIN
    assert tune.improved(BEGIN, Landscape(best=best, step=0.04).trial, lambda: math.inf) == best


def test_what_spills_is_not_timed_and_what_is_wrong_not_taken():
    best = BEGIN | {"num_stages": 4}
    spilling = Landscape(best=best, spilling=[best])
    assert tune.improved(BEGIN, spilling.trial, lambda: math.inf) == BEGIN and best not in spilling.timed
    wrong = Landscape(best=best, wrong=[best])
    assert tune.improved(BEGIN, wrong.trial, lambda: math.inf) == BEGIN and best in wrong.timed


def test_what_this_gpu_cannot_launch_gives_way():
    best = BEGIN | {"num_stages": 2}
    assert tune.improved(BEGIN, Landscape(best=best, too_large=[BEGIN]).trial, lambda: math.inf) == best
    assert tune.improved(BEGIN, Landscape(best=best, too_large=[best]).trial, lambda: math.inf) == BEGIN


def test_stops_when_the_time_is_over():
    landscape = Landscape(best=BEGIN | {"BLOCK": 512})
    assert tune.improved(BEGIN, landscape.trial, lambda: 0.0) == BEGIN and not landscape.timed
    assert tune.improved(BEGIN, landscape.trial, lambda: 10.0 - len(landscape.timed))["BLOCK"] == 128


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A launch table of one kernel; its path."""
    entries = [{"up_to": {"rows": 16}} | BEGIN, dict(BEGIN)]
    path = tmp_path / "example.json"
    tune.write(path, {"forward": {name: entries for name in ("sm_80", "sm_90", "sm_100")}})
    launch.table.cache_clear()
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    yield path
    launch.table.cache_clear()


def test_writes_what_is_faster_and_nothing_else(table):
    best = BEGIN | {"BLOCK": 128}
    before = json.loads(table.read_text())
    entries = {
        Entry("example", "forward", "sm_90", 0): lambda: Landscape(best=best).trial,
        Entry("example", "forward", "sm_90", 1): lambda: Landscape().trial,
    }
    lines = list(tune.tuned(entries, table.parent, end=time.monotonic() + 60))
    assert lines[0].startswith("example.forward, sm_90[0] takes 9% less time: {'BLOCK': 64,")
    assert lines[1].startswith("example.forward, sm_90[1] stays {'BLOCK': 64,")
    assert table.read_text().count("\n") == 16
    before["forward"]["sm_90"][0] = {"up_to": {"rows": 16}} | best
    assert json.loads(table.read_text()) == before
    assert launch.table("example") == before
    assert [path.name for path in table.parent.iterdir()] == ["example.json"]
    assert stat.S_IMODE(table.stat().st_mode) == 0o644


def test_entries_share_the_time(table):
    now = [0.0]
    landscapes = [Landscape(best=BEGIN | {"BLOCK": 8192}) for _ in range(2)]

    def slow(landscape):
        def seconds(settings):
            now[0] += 1.0
            return landscape.seconds(settings)

        return Trial(landscape.trial.usable, seconds, landscape.trial.right)

    entries = {Entry("example", "forward", "sm_80", i): lambda i=i: slow(landscapes[i]) for i in range(2)}
    list(tune.tuned(entries, table.parent, end=60.0, clock=lambda: now[0]))
    assert all(25 <= len(landscape.timed) <= 40 for landscape in landscapes)


def test_no_share_is_too_short_to_compile_in(table):
    now, patience = [0.0], []

    def usable(some, seconds):
        patience.append(seconds)
        now[0] += seconds
        return []

    trial = Trial(usable, Landscape().seconds, lambda settings: True)
    entries = {Entry("example", "forward", "sm_80", i % 2): lambda: trial for i in range(2)}
    entries |= {Entry("example", "forward", "sm_90", i % 2): lambda: trial for i in range(2)}
    assert len(list(tune.tuned(entries, table.parent, end=30.0, clock=lambda: now[0]))) == 4
    assert patience == pytest.approx([14.0, 0.7 * 16.0, 0.7 * 4.8, 0.7 * 1.44])
    now[0] = 30.0
    assert list(tune.tuned(entries, table.parent, end=30.0, clock=lambda: now[0])) == [
        "The time is over: 4 entries of 4 stay as they are"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(["rms_norm"])
    assert stopped.value.code == 2
    assert "Launches are tuned on a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["rms_nrom"])
    assert "There are no operators ['rms_nrom'] that have a bench" in capsys.readouterr().err


PROGRAM = """
from vlcore.bench.launches import Entry
from vlcore.bench.trials import Run, spills

entry = Entry("swiglu", "forward", "sm_90", 0)
assert spills(Run("swiglu", 0, "bfloat16"), "sm_90", 90) == {entry: 0}
assert spills(Run("swiglu", 0, "float32"), "sm_90", 90, {entry: {"BLOCK": 512, "num_warps": 2}}) == {entry: 0}
"""


@pytest.mark.skipif(not launch.AVAILABLE, reason="Triton is not installed")
def test_settings_that_are_not_in_the_table_are_compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_benches_launch_is_compiled_ahead(monkeypatch):
    compiled = []
    monkeypatch.setattr(trials, "_this_gpu", lambda: ("sm_90", 90))
    monkeypatch.setattr(trials, "spills", lambda *given: compiled.append(given))
    runs = [trials.Run("swiglu", place, dtype) for place in (0, 99) for dtype in ("bfloat16", "float32")]
    with ThreadPoolExecutor(1) as pool:
        trials.compile_benched(runs, pool)
        assert compiled == [(run, "sm_90", 90) for run in runs[:2]]


ORDER = """
from types import SimpleNamespace
from unittest.mock import patch

from vlcore.bench import trials

at_once = SimpleNamespace(submit=lambda function, *given: SimpleNamespace(result=lambda: function(*given)))
with patch.object(trials, "_this_gpu", return_value=("sm_90", 90)):
    for entry, runs in trials.reached(["swiglu", "attention"], at_once).items():
        dtypes = {run.dtype for run in runs}
        print(entry.operator, entry.index, any(run.dtype == "bfloat16" and run.is_benched for run in runs), *dtypes)
"""


@pytest.mark.skipif(not launch.AVAILABLE, reason="Triton is not installed")
def test_what_the_benches_reach_comes_first_in_the_order_of_the_operators():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ORDER], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    benched = [line[2] == "True" for line in lines]
    assert benched == sorted(benched, reverse=True) and not all(benched)
    operators = [line[0] for line in lines if line[2] == "True"]
    assert operators == sorted(operators, reverse=True) and {"swiglu", "sequence_attention"} <= {*operators}
    # A product is launched otherwise in TF32 than in float32, and what multiplies nothing is not.
    for operator, _, _, *dtypes in lines:
        assert ("tf32" in dtypes) <= ("float32" not in dtypes)
        assert (operator == "swiglu") <= ({*dtypes} == {"bfloat16", "float32"})
    assert any(dtypes == ["tf32"] for *_, dtypes in [(line[0], line[3:]) for line in lines])
