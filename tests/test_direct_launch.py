"""Launching compiled kernels directly: Triton's launcher is called as Triton itself calls it, or Triton does it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch

from vlcore import native, ops
from vlcore.kernels import launch

if not launch.AVAILABLE:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton.language as tl
from recorder import ARGUMENTS_BEFORE, Recorder
from triton import knobs
from triton.runtime.jit import JITFunction

from vlcore.bench.launches import watched
from vlcore.bench.stand_in import in_place_of_a_gpu
from vlcore.kernels import direct_launch

ROOT = Path(__file__).parent.parent
NO_EXTENSION = "vlcore was built without its C++ extension: Triton launches all"
GRID = (2, 3)
SETTINGS = {"BLOCK": 16, "NEGATED": False, "num_warps": 2}


def scaled(x_ptr, y_ptr, out_ptr, size, shift, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NEGATED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    if y_ptr is not None:
        x += tl.load(y_ptr + at, mask=at < size)
    x = x * scale + (shift + WIDTH)
    tl.store(out_ptr + at, -x if NEGATED else x, mask=at < size)


@pytest.fixture
def any_driver(monkeypatch):
    monkeypatch.setattr(direct_launch, "_kept", {})
    recorder = Recorder()
    with in_place_of_a_gpu(recorder, "sm_90"):
        yield recorder


@pytest.fixture
def driver(any_driver):
    """Where kernels are launched directly."""
    if native.cpp is None:
        pytest.skip(NO_EXTENSION)
    return any_driver


@pytest.fixture
def kernel():
    return JITFunction(scaled)


def given(**changes):
    """The tensors, numbers and settings of a launch."""
    parts = {"x": torch.zeros(64), "y": torch.zeros(64), "out": torch.zeros(64)}
    parts |= {"size": 64, "shift": 3, "scale": 0.5, "WIDTH": 48} | SETTINGS | changes
    names = list(parts)
    tensors, numbers = tuple(parts[name] for name in names[:3]), tuple(parts[name] for name in names[3:7])
    return tensors, numbers, {name: parts[name] for name in names[7:]}


def directly(driver, kernel, grid=GRID, **changes):
    direct_launch.run(kernel, grid, *given(**changes))
    return driver.launches[-1]


def by_triton(driver, kernel, grid=GRID, **changes):
    tensors, numbers, settings = given(**changes)
    kernel[grid](*tensors, *numbers, enable_fp_fusion=True, **settings)
    return driver.launches[-1]


def function(launched):
    return launched[4]


def arguments(launched):
    return launched[ARGUMENTS_BEFORE:]


def is_direct(launched):
    """Triton hands tensors over as they are."""
    return not any(isinstance(argument, torch.Tensor) for argument in arguments(launched))


def addresses(values):
    return [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]


def same(values, others):
    return [(type(value), value) for value in values] == [(type(value), value) for value in others]


CHANGES = {
    "nothing": {},
    "another dtype": {"x": torch.zeros(64, dtype=torch.bfloat16)},
    "no tensor": {"y": None},
    "an int that is 1": {"size": 1},
    "an int that is no multiple of 16": {"size": 63},
    "an int of 64 bits": {"shift": 2**40},
    "a float where an int was": {"shift": 3.0},
    "a bool where an int was": {"shift": True},
    "an int where a float was": {"scale": 2},
    "another constant among the numbers": {"WIDTH": 49},
    "another block": {"BLOCK": 32},
    "another flag": {"NEGATED": True},
    "other warps": {"num_warps": 4},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("grid", [(5,), (5, 4), (5, 4, 3)])
def test_the_launcher_is_called_as_by_triton(driver, kernel, grid, changes):
    tensors = {name: torch.zeros(64) for name in ("x", "y", "out")} | changes
    wanted = by_triton(driver, kernel, grid, **tensors)
    first, second = (directly(driver, kernel, grid, **tensors) for _ in range(2))
    assert not is_direct(first) and is_direct(second)
    assert second[:6] == wanted[:6] and second[:3] == (*grid, 1, 1)[:3]
    assert second[6:ARGUMENTS_BEFORE] == (None, None, None)
    assert same(arguments(second), addresses(arguments(wanted)))


@pytest.mark.parametrize("changes", list(CHANGES.values())[1:], ids=list(CHANGES)[1:])
def test_what_is_specialised_otherwise_is_another_kernel(driver, kernel, changes):
    for _ in range(2):
        usual, other = directly(driver, kernel), directly(driver, kernel, **changes)
    assert is_direct(usual) and is_direct(other)
    assert function(usual) == function(by_triton(driver, kernel))
    assert function(other) == function(by_triton(driver, kernel, **changes)) != function(usual)


def test_equal_numbers_of_other_types_are_not_mistaken_for_one_another(driver, kernel):
    for _ in range(2):
        functions = [function(directly(driver, kernel, shift=shift)) for shift in (1, 1.0, True)]
    assert functions == [function(by_triton(driver, kernel, shift=shift)) for shift in (1, 1.0, True)]
    assert len(set(functions)) == 3


@pytest.mark.parametrize("name", ["x", "y", "out"])
def test_tensors_that_are_not_aligned_are_launched_by_triton(driver, kernel, name):
    aligned = function([directly(driver, kernel) for _ in range(2)][1])
    misaligned = {name: torch.zeros(65)[1:]}
    for _ in range(2):
        launched = directly(driver, kernel, **misaligned)
        assert not is_direct(launched) and function(launched) != aligned
    assert is_direct(directly(driver, kernel)) and function(directly(driver, kernel)) == aligned


def test_is_launched_on_the_current_stream_and_device(driver, kernel):
    for _ in range(2):
        first = directly(driver, kernel)
    driver.stream = 7
    assert is_direct(directly(driver, kernel)) and driver.launches[-1][3] == 7 != first[3]
    driver.device = 1
    for _ in range(2):
        second = directly(driver, kernel)
    assert is_direct(second) and function(second) != function(first)


def test_another_kernel_of_the_same_arguments_is_another(driver, kernel):
    other = JITFunction(scaled)
    for _ in range(2):
        functions = [function(directly(driver, one)) for one in (kernel, other)]
    assert functions[0] != functions[1]


def test_what_the_launcher_raises_is_raised(driver, kernel):
    for _ in range(2):
        directly(driver, kernel)

    class Refusing(list):
        def append(self, arguments):
            raise RuntimeError("out of resources")

    driver.launches = Refusing()
    with pytest.raises(RuntimeError, match="out of resources"):
        directly(driver, kernel)


def test_without_the_extension_triton_launches_all(any_driver, kernel, monkeypatch):
    monkeypatch.setattr(direct_launch, "_launch_again", direct_launch._nothing_is_kept)
    for _ in range(3):
        assert not is_direct(directly(any_driver, kernel))
    assert not direct_launch._kept


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_launch(driver, kernel, name):
    def hook(metadata):
        raise AssertionError("Triton's launcher calls it, which is not here")

    for _ in range(2):
        directly(driver, kernel)
    chain = getattr(knobs.runtime, name)
    chain.add(hook)
    try:
        launched = directly(driver, kernel)
    finally:
        chain.remove(hook)
    assert not is_direct(launched) and chain in launched[6:ARGUMENTS_BEFORE]
    assert is_direct(directly(driver, kernel))


@pytest.mark.parametrize("put", [lambda metadata: None, None])
def test_a_hook_in_place_of_the_chain_is_triton_s_business(driver, kernel, put, monkeypatch):
    for _ in range(2):
        directly(driver, kernel)
    monkeypatch.setitem(knobs.runtime.__dict__, "launch_enter_hook", put)
    assert not is_direct(directly(driver, kernel)) and driver.launches[-1][7] is put


def test_hooks_before_a_run_see_every_launch(driver, kernel):
    seen = []
    for _ in range(2):
        directly(driver, kernel)
    kernel.add_pre_run_hook(lambda *arguments, **settings: seen.append(settings["num_warps"]))
    for _ in range(2):
        directly(driver, kernel)
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("runtime", "debug", True),
        ("runtime", "add_stages_inspection_hook", lambda *arguments: ("", "")),
        ("compilation", "instrumentation_mode", "fpsan"),
    ],
)
def test_debugging_is_triton_s_business(part, name, value, monkeypatch):
    assert not direct_launch.is_observed()
    monkeypatch.setitem(getattr(knobs, part).__dict__, name, value)
    assert direct_launch.is_observed()


def test_what_watches_launches_sees_all_of_them(driver, kernel):
    seen = []

    def watcher(name, entry, go):
        seen.append(name)
        return go()

    for _ in range(2):
        directly(driver, kernel)
    with watched(watcher):
        for _ in range(3):
            directly(driver, kernel)
    assert seen == 3 * ["scaled"]
    assert is_direct(directly(driver, kernel)) and len(seen) == 3


def test_no_more_is_kept_than_is_allowed(driver, kernel, monkeypatch):
    monkeypatch.setattr(direct_launch, "MAX_KEPT", 3)
    for size in [*range(16, 320, 16)] * 2:
        launched = directly(driver, kernel, size=size)
        assert arguments(launched)[3] == size and 0 < len(direct_launch._kept) <= 3
    assert is_direct(directly(driver, kernel, size=size))


def test_threads_launch_what_they_are_given(driver, kernel, monkeypatch):
    monkeypatch.setattr(direct_launch, "MAX_KEPT", 2)
    directly(driver, kernel)
    driver.launches.clear()

    def work(shift):
        for _ in range(50):
            directly(driver, kernel, shift=shift)

    threads = [Thread(target=work, args=(shift,)) for shift in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(arguments(launched)[4] for launched in driver.launches) == [n for n in range(2, 8) for _ in range(50)]


def printed(*arguments):
    """By Python without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(native.cpp is None, reason=NO_EXTENSION)
def test_every_launcher_s_later_launches_are_direct_and_triton_s():
    lines = printed("-m", "tests.launch_everything")
    found = re.findall(r"(\w+).*: (\d+) of (\d+), (\d+) of them repeated", lines)
    assert all(direct == launched != "0" for _, direct, launched, _ in found), lines
    # The others copy, sum, cut up or multiply what takes longer than to launch it; the last one in its gradient only.
    assert {name for name, _, launched, repeated in found if repeated != launched} == {
        *("downsample_features", "hybrid_adaptor", "linear_cross_entropy", "rel_pos_attention", "window_attention"),
        "quantized_linear",
    }
    assert "quantized_linear, 8 bits: 1 of 1, 1 of them repeated" in lines
    with_triton = {
        name for name in ops.__all__ if "triton" in getattr(sys.modules.get(f"vlcore.ops.{name}"), "KERNELS", ())
    }
    assert {name for name, *_ in found} == with_triton


def test_what_a_launch_costs_is_measured_without_a_gpu():
    program = """
import torch
from vlcore.bench import overhead, report, timing
timing.CALLED_TURNS = 3
for found in overhead.launched(torch.float32, ("swiglu", "attention")):
    print(report.line(found))
"""
    shape = r"call of (\w+) on Triton without a GPU  .*, gradients (.*)  float32"
    found = re.findall(rf"{shape}  launched directly [\d.]+ µs .*  launched by Triton [\d.]+x", printed("-c", program))
    assert found == [(name, kept) for name in ("swiglu", "attention") for kept in ("not recorded", "recorded")]
