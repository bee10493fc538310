"""bench/on_gpu.sh without a GPU: its commands are ones that exist, and a step that fails stops no other."""

import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlcore import cli
from vlcore.bench import record
from vlcore.bench.harness import Measurement
from vlcore.bench.report import Results, read
from vlcore.bench.timing import machine

ROOT = Path(__file__).parent.parent
STEPS = ["build", "tests", "tune", "overhead", "operators", "models", "record"]
LONG = ["tune-more", "compiled-operators", "compiled-models"]

# In the place of Python: what was asked for fails where a test does, and is written down.
STAND_IN = """#!{python}
import os, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "vlcore.bench.record"] or arguments[0] == "-c":
    os.execv(sys.executable, [sys.executable, *arguments])
sys.exit(arguments[:2] == ["-m", "pytest"])
"""


def on_gpu(*arguments, python=sys.executable):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "on_gpu.sh"), "--device", "cpu", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PYTHON": str(python), "PATH": "/usr/local/bin:/usr/bin:/bin"},
    )


def commands(output: str) -> dict[str, tuple[int, list[str]]]:
    """Each step's limit in seconds, and its command."""
    found = {}
    for line in output.splitlines():
        if line.startswith("== ") and ", at most " in line:
            step, _, rest = line.removeprefix("== ").partition(", at most ")
            limit, _, command = rest.partition(" s: ")
            found[step] = int(limit), shlex.split(command)
    return found


def test_every_command_exists_and_all_fit_into_a_call(tmp_path):
    done = on_gpu("--dry-run", tmp_path)
    assert done.returncode == 0, done.stderr
    found = commands(done.stdout) | commands(on_gpu("--dry-run", tmp_path, *LONG).stdout)
    assert [*found] == [*STEPS, *LONG]
    # Some is needed to begin, and by what is slow to end.
    assert sum(found[step][0] for step in STEPS) <= 520
    ignored = [given.removeprefix("--ignore=") for given in found["tests"][1] if given.startswith("--ignore=")]
    assert len(ignored) > 10 and all((ROOT / path).exists() for path in ignored)
    for _, command in found.values():
        if "-m" in command[:3]:
            module = command[command.index("-m") + 1]
            assert find_spec(module), module
            if module == "vlcore.cli":
                cli._parser().parse_args(command[command.index(module) + 1 :])


def test_a_failed_step_stops_no_other_and_is_told(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    done = on_gpu("--commit", "abc", tmp_path / "out", python=stand_in)
    assert done.returncode == 1
    assert [*commands(done.stdout)] == STEPS
    assert "== tests: status 1" in done.stdout and "== failed: tests" in done.stdout
    assert (tmp_path / "out" / "log.txt").read_text() == done.stdout
    assert read(tmp_path / "out" / "cpu.json").made_by["commit"] == "abc"


def test_what_a_step_leaves_behind_is_ended_with_it(tmp_path):
    """The log is whole when all that writes to it is gone."""
    stand_in = tmp_path / "python"
    leave = 'if "vlcore.bench.tune" in arguments:\n    import subprocess\n    subprocess.Popen(["sleep", "300"])\n'
    stand_in.write_text(STAND_IN.format(python=sys.executable).replace("sys.exit(", leave + "sys.exit("))
    stand_in.chmod(0o755)
    begin = time.monotonic()
    done = on_gpu(tmp_path / "out", python=stand_in)
    assert [*commands(done.stdout)] == STEPS and time.monotonic() - begin < 100


def test_an_unknown_option_is_named():
    done = on_gpu("--fast")
    assert done.returncode == 2 and "there is no option --fast" in done.stderr


def measured(operator, **more):
    known = {"shape": "2 × 3", "dtype": "float32", "trains": False, "ours": "cpp", "seconds": {"cpp": 1.0}}
    return Measurement(operator=operator, **known, **more)


def test_results_begin_with_what_the_same_machine_gave_before(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for folder, name in (("same", machine("cpu")), ("other", "another")):
        Results(name, [measured("swiglu", commit="abc"), measured("rms_norm")]).write(tmp_path / "cpu.json")
        (tmp_path / folder).mkdir()
        file = record.begin(tmp_path / folder, "cpu")
        assert file.exists() == (folder == "same")
    kept = read(tmp_path / "same" / "cpu.json").measurements
    assert [found.commit for found in kept] == ["abc", "an earlier one"]


def test_a_record_says_what_made_it_and_how_the_tests_went(tmp_path, capsys):
    suites = '<testsuite tests="9" failures="1" errors="2" skipped="3"/><testsuite tests="1"/>'
    (tmp_path / "tests.xml").write_text(f"<testsuites>{suites}</testsuites>")
    file = tmp_path / "results.json"
    record.main([str(file), "--commit", "abc", "--tests", str(tmp_path / "tests.xml")])
    found = read(file)
    assert found.tests == {"passed": 4, "failed": 3, "skipped": 3}
    assert found.made_by["commit"] == "abc" and "torch" in found.made_by
    record.main([str(file), "--commit", "abc"])
    assert read(file).tests == found.tests
    record.main([str(file), "--commit", "another"])
    assert read(file).tests == {}
    record.main(["--begin", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "cpu.json")


@pytest.mark.parametrize(("capability", "name"), [((8, 6), "86"), ((9, 0), "90a"), ((10, 0), "100a")])
def test_nvcc_compiles_for_the_gpu_that_is_there(monkeypatch, capability, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert record.architecture() == name


def test_what_was_measured_before_keeps_its_commit(tmp_path):
    file = tmp_path / "results.json"
    results = Results("here", [measured("swiglu", commit="abc"), measured("rms_norm")])
    results.add(measured("layer_norm"))
    results.write(file)
    record.main([str(file), "--commit", "def"])
    assert [found.commit for found in read(file).measurements] == ["abc", "def", "def"]
