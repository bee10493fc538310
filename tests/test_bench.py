"""The bench: nothing wrong is timed, results are kept and shown as they were measured."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vlcore import cli, ops
from vlcore.bench import command, decoding, harness, models, timing, training
from vlcore.bench.harness import Case, Maker, Measurement
from vlcore.bench.peers import EAGER, OURS, SDPA, operators, public_twin, torch_backend
from vlcore.bench.plot import draw
from vlcore.bench.report import TABLES, Results, line, read, with_tables
from vlcore.bench.shapes import BATCH, PROMPT
from vlcore.bench.timing import Roofline
from vlcore.config import preset
from vlcore.kernels import launch
from vlcore.ops.swiglu import KERNELS

LIMIT = Roofline(flops=4e11, bandwidth=4e10)
FOUND = Measurement(
    operator="swiglu",
    shape="2 × 3",
    dtype="float32",
    trains=False,
    ours="cpp",
    seconds={"cpp": 2e-3, "F.silu": 5e-3},
    limit=LIMIT,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(command, "roofline", lambda dtype, device: LIMIT)


def case(**changes):
    given = {"operator": "swiglu", "shape": "5 × 7", "inputs": lambda make: (make(5, 7), make(5, 7))}
    return Case(**(given | changes))


@pytest.mark.parametrize("trains", [False, True])
def test_measures_every_backend_and_peer(trains):
    peers = {"silu": lambda gate, up: torch.nn.functional.silu(gate) * up}
    found = harness.measure(case(peers=peers, trains=trains), Maker(torch.float32, "cpu"))
    assert set(found.seconds) == {*KERNELS} - {"triton"} | {"torch backend", "silu"}
    assert found.trains == trains and found.seconds[found.ours] > 0


def test_a_wrong_result_is_not_timed():
    def wrong(gate, up, *, backend):
        return ops.swiglu(gate, up, backend=backend) + (1e-3 if backend == "cpp" else 0)

    timed = []
    peers = {"peer": lambda gate, up: timed.append(1)}
    with pytest.raises(AssertionError, match="torch's own is"):
        harness.measure(case(function=wrong, peers=peers), Maker(torch.float32, "cpu"))
    assert not timed
    with pytest.raises(AssertionError, match="torch's own is"):
        harness.prepared(case(function=wrong), Maker(torch.float32, "cpu"), "cpp")


def test_pytest_benchmark_takes_every_case_with_every_backend_and_peer():
    root = Path(__file__).parent.parent
    command_line = [sys.executable, "-m", "pytest", "-q", "--dtype", "float32", "--benchmark-max-time", "0.01"]
    one_row = f"swiglu and not {PROMPT} and not {BATCH}"
    # It is no worker of these tests, where they have several: as one, pytest-benchmark would time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command_line, "bench/bench_swiglu.py", "-k", one_row],
        cwd=root,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert "benchmark 'swiglu, 1 × 5632, float32'" in done.stdout and "F.silu, *" in done.stdout, done.stdout
    assert done.returncode == 0 and f"{len(KERNELS) - ('triton' in KERNELS) + 2} passed" in done.stdout


def test_a_kernel_is_timed_where_it_runs():
    given = Case(operator="rms_norm", shape="", inputs=lambda make: ())
    assert given.backends("cpu") == ["cpp"] and given.backends("cuda") == ["triton"]


def test_only_our_kernels_that_were_built_are_timed(monkeypatch):
    """A GPU's box need have neither xformers nor nvcc: a backend that is missing would keep a case from being timed."""
    rotary, decoding = (
        Case(operator=f"{name}_attention", shape="", inputs=lambda make: ()) for name in ("rope", "decode")
    )
    assert rotary.backends("cuda") == ["triton"]
    monkeypatch.setattr(harness.native, "cuda", object())
    assert decoding.backends("cuda") == ["cuda", "triton"]
    monkeypatch.setattr(harness.native, "cuda", None)
    assert decoding.backends("cuda") == ["triton"]


def test_inputs_are_taken_in_turn():
    seen = []

    def watch(x, *, backend):
        seen.append(x)
        return x

    harness.measure(
        case(inputs=lambda make: [(make(2),), (make(2),), (make(2),)], function=watch), Maker(torch.float32, "cpu")
    )
    assert len({x.data_ptr() for x in seen}) >= 3


@pytest.mark.parametrize("operator", command.benched())
def test_every_case_is_of_its_operator_and_can_be_listed(operator):
    cases = command.cases(operator)
    assert cases and all(case.operator == operator for case in cases)
    assert len({(case.title, case.shape) for case in cases}) == len(cases)


def test_the_terminal_says_time_rate_and_ratios():
    assert line(FOUND) == "swiglu  2 × 3  float32  cpp 2 ms  F.silu 2.50x"
    assert "cpp 2 ms (from 1.9 ms to 2.2 ms)" in line(dataclasses.replace(FOUND, quartiles={"cpp": (1.9e-3, 2.2e-3)}))
    rated = dataclasses.replace(FOUND, bytes=4e7, trains=True, memory={"cpp": 2**20, EAGER: 2**22})
    assert "forward and backward" in line(rated)
    assert "20.0 GB/s (50%)  1 MiB beside 4" in line(rated)
    assert "100 GFLOP/s (25%)" in line(dataclasses.replace(FOUND, flops=2e8))
    assert "20 TFLOP/s" in line(dataclasses.replace(FOUND, flops=4e10))
    assert "2.00 TB/s" in line(dataclasses.replace(FOUND, bytes=4e9))


def test_results_are_kept_and_replaced(tmp_path):
    file = tmp_path / "results.json"
    results = Results("here")
    results.add(dataclasses.replace(FOUND, quartiles={"cpp": (1e-3, 3e-3)}))
    results.add(dataclasses.replace(FOUND, dtype="bfloat16"))
    results.add(dataclasses.replace(FOUND, seconds={"cpp": 1.0, "F.silu": 3.0}))
    results.write(file)
    assert read(file) == results
    assert [found.seconds["cpp"] for found in read(file).measurements] == [1.0, 2e-3]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"machine": "a", "measurements": [{"b": 1}]}'])
def test_a_file_that_is_not_ours_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no file of results"):
        read(tmp_path / "x.json")


def test_the_command_adds_to_its_file_and_knows_its_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "SECONDS", 0.1)
    file, plot = tmp_path / "results.json", tmp_path / "plot.png"
    arguments = ["bench", "swiglu", "--dtype", "float32", "--no-compile", "--json", str(file), "--plot", str(plot)]
    assert cli.main(arguments) == 0 and plot.exists()
    assert "F.silu" in capsys.readouterr().out
    measured = read(file)
    assert {found.operator for found in measured.measurements} == {"swiglu"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another"}))
    assert cli.main(arguments) == 2
    assert "holds what was measured on 'another'" in capsys.readouterr().err


def test_what_a_call_costs(monkeypatch, capsys):
    monkeypatch.setattr(timing, "CALLED_TURNS", 3)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert cli.main(["bench", "--overhead", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 8
    assert lines[0].startswith("call of rms_norm  1 × 2048, gradients not recorded  float32  auto ")
    assert all(any(peer in line for peer in ("F.rms_norm", "F.layer_norm", "F.silu")) for line in lines)


def test_the_command_refuses_what_it_cannot_bench(capsys):
    assert cli.main(["bench", "swigloo"]) == 2
    assert "There is no bench of 'swigloo'; there are add_rms_norm" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "swiglu", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_within_torch_backend_there_are_no_kernels():
    kept = dict(KERNELS)
    with pytest.raises(ZeroDivisionError), torch_backend():
        assert not KERNELS
        raise ZeroDivisionError
    assert kept == KERNELS
    assert {"swiglu", "decode_attention"} <= set(operators()) and "quantize_weight" not in operators()


@pytest.mark.parametrize("name", ["tiny", "deepseek_vl_1_3b"])
def test_transformers_reads_our_weights_where_they_are(name):
    config = preset(name)
    if name != "tiny":  # SigLIP alone, small
        small = preset("tiny")
        config = dataclasses.replace(config, siglip=small.siglip, language=small.language, image_token_id=3)
    model = models.random_model(config, torch.float32, "cpu")
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    twin = public_twin(model, "sdpa")
    theirs = {p.untyped_storage().data_ptr() for p in twin.parameters() if not p.is_meta}
    assert theirs == ours
    ids = torch.randint(4, 100, (1, 9))
    torch.testing.assert_close(model(ids).logits, twin(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def small_end_to_end(monkeypatch, function):
    small = dataclasses.replace(preset("tiny"), image_token_id=100)
    for module in (models, decoding, training):
        monkeypatch.setattr(module, "preset", lambda name: small)
    for module in (models, decoding):
        monkeypatch.setattr(module, "PROMPT", 12)
    return [
        found for case in function(torch.float32, "cpu", False) for found in models.measure(case, torch.float32, "cpu")
    ]


@pytest.mark.parametrize(("function", "count"), [(models.vision, 3), (models.prefill, 1)])
def test_models_end_to_end(monkeypatch, function, count):
    found = small_end_to_end(monkeypatch, function)
    assert len(found) == count
    assert all(set(one.seconds) == {OURS, EAGER, SDPA} for one in found)


@pytest.mark.parametrize("function", [models.vision, models.prefill])
def test_whole_models_stay_on_the_device_that_was_named(monkeypatch, function):
    small = preset("tiny")
    monkeypatch.setattr(models, "preset", lambda name: small)
    for case in function(torch.bfloat16, "meta", False):
        runs = case.peers if function is models.prefill else case.ours | case.peers  # our cache looks at its lengths
        with torch.inference_mode():
            assert all(run().is_meta for run in runs.values())


def test_decoding_end_to_end(monkeypatch):
    found = small_end_to_end(monkeypatch, decoding.decode)
    assert [one.ours for one in found] == [OURS, "vlcore, int8", "vlcore, int4"]
    assert found[0].bytes > found[1].bytes > found[2].bytes


def test_a_training_step_end_to_end(monkeypatch):
    (found,) = small_end_to_end(monkeypatch, training.train)
    assert found.trains and set(found.seconds) == {OURS, "torch backend"}


def test_working_memory_counts_what_a_function_holds():
    def hold(megabytes):
        return lambda: torch.ones(megabytes * 2**18)

    small, large = (timing.working_memory(hold(megabytes), "cpu") for megabytes in (10, 100))
    if small is not None:
        assert small < 20 * 2**20 < 90 * 2**20 < large < 110 * 2**20


class Clock:
    """Time that passes where somebody works."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def working(self, seconds):
        def work():
            self.now += seconds

        return work


def test_a_gpu_is_kept_busy_until_the_host_has_queued_all_and_is_timed_by_events(monkeypatch):
    clock, flushes = Clock(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock.now

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

        def synchronize(self):
            pass

    class Flushed:
        def sum(self):
            clock.working(1e-3)()
            flushes.append(1)

    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(torch, "ones", lambda size, device: Flushed())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "GPU_SECONDS", 0.0)
    found = timing.computed({"slow": clock.working(2e-2), "fast": clock.working(1e-3)})
    assert found["slow"] == pytest.approx((2e-2, 2e-2, 2e-2)) and found["fast"] == pytest.approx((1e-3, 1e-3, 1e-3))
    # Three to be timed themselves, and before each of three turns at least half as much again as the host took.
    assert len(flushes) >= 3 + 3 * (30 + 1)


def test_the_readme_shows_what_was_measured():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    assert with_tables(text) == text


def test_a_plot_shows_every_measurement(tmp_path, monkeypatch):
    rated = dataclasses.replace(FOUND, flops=2e8, traffic=4e6, trains=True, seconds={**FOUND.seconds, "slow": 1.0})
    draw(Results("here", [FOUND, rated, dataclasses.replace(rated, dtype="bfloat16")]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(Results("here", [dataclasses.replace(FOUND, seconds={"cpp": 1.0})]), tmp_path / "b.png")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert cli.main(["bench", "swiglu", "--plot", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr()
    assert "pip install 'vlcore[plot]'" in said.err and not said.out


@pytest.mark.parametrize(
    "name, message", [("a.xyz", "a.xyz: matplotlib writes no .xyz; it writes "), ("no/a.png", "there is no folder ")]
)
def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path, capsys, name, message):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "swiglu", "--plot", str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_a_model_without_transformers_is_refused_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in command.PEERS else find_spec(name))
    assert cli.main(["bench", "--model", "vision"]) == 2
    said = capsys.readouterr()
    assert "transformers and accelerate are not installed: pip install 'vlcore[bench]'" in said.err and not said.out


def test_operators_need_no_transformers():
    program = """
import sys
sys.modules["transformers"] = sys.modules["accelerate"] = None  # importing them raises
from vlcore.bench import command, overhead
assert [case.operator for name in command.benched() for case in command.cases(name)]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


MARKS = "".join(f"<!-- {device} {what} -->\n<!-- end -->\n" for device in ("cpu", "cuda", "cpu amx") for what in TABLES)


def test_tables_stand_between_their_marks(tmp_path):
    assert with_tables("nothing", tmp_path) == "nothing"
    assert with_tables(MARKS, tmp_path).count("Not measured yet.") == 4
    Results("a machine", [FOUND]).write(tmp_path / "cpu.json")
    whole = dataclasses.replace(FOUND, ours=OURS, seconds={OURS: 1e-3, SDPA: 2e-3}, dtype="bfloat16")
    earlier, later = dataclasses.replace(FOUND, commit="abc"), dataclasses.replace(whole, commit="def")
    gpu = Results("a GPU", [earlier, later], {"commit": "def"}, {"passed": 7, "failed": 0, "skipped": 1})
    gpu.write(tmp_path / "h100.json")
    dataclasses.replace(gpu, machine="another").write(tmp_path / "h200.json")
    dataclasses.replace(gpu, machine="tiles").write(tmp_path / "cpu_amx.json")
    text = with_tables(MARKS, tmp_path)
    assert with_tables(text, tmp_path) == text
    cpu, _, cuda, models, amx, _ = (
        text.split(mark)[1].split("<!-- end -->")[0] for mark in MARKS.split("\n")[::2] if mark
    )
    assert "| swiglu | 2 × 3 | 2 ms, **2.50×** F.silu |" in cpu and "bfloat16" not in cpu
    tested = "tests: 7 passed, 0 failed, 1 skipped:"
    assert cuda.index(f"a GPU, of abc and def; {tested}") < cuda.index(f"another, of abc and def; {tested}")
    assert models.count("transformers SDPA **2.00×**") == 2
    assert "| swiglu | 2 × 3 | 2 ms, **2.50×** F.silu |" in amx and "tiles" not in cuda


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_without_marks_are_missed(tmp_path, device):
    Results("here", [FOUND]).write(tmp_path / ("cpu.json" if device == "cpu" else "h100.json"))
    with pytest.raises(ValueError, match=f"<!-- {device} operators -->"):
        with_tables("nothing", tmp_path)
