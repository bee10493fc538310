"""Calls of launchers that are repeated: the same launches on tensors that look the same."""

from threading import Thread

import pytest
import torch
from launchers import Launcher, arguments, called, scale, scaled, start
from recorder import ARGUMENTS_BEFORE
from triton.runtime.jit import JITFunction

from vlcore import native
from vlcore.kernels import replay


def test_from_the_third_call_on_the_launcher_does_not_run(driver, kernel):
    launcher = Launcher(kernel)
    launched = [called(driver, launcher, torch.zeros(3, 16), None, 0.5)[1] for _ in range(5)]
    assert launcher.runs == 2
    assert all(len(launches) == 1 for launches in launched)
    first, *_, last = (launches[0] for launches in launched)
    assert last[:6] == first[:6] and last[6:ARGUMENTS_BEFORE] == (None, None, None)
    assert arguments(last)[3:] == arguments(first)[3:] == (48, 0.5, 16)


@pytest.mark.parametrize("bias", [None, torch.zeros(16)], ids=["without bias", "with bias"])
def test_launches_are_on_the_tensors_of_the_call(driver, kernel, bias):
    launcher = Launcher(kernel)
    for _ in range(4):
        x = torch.zeros(3, 16)
        out, [launched] = called(driver, launcher, x, None if bias is None else bias.clone())
        assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    assert launcher.runs == 2
    assert arguments(launched)[0] == x.data_ptr() and arguments(launched)[2] == out.data_ptr()
    assert (arguments(launched)[1] is None) == (bias is None)


def test_results_are_given_back_as_the_launcher_gives_them(driver, kernel):
    def body(kernel, x, bias):
        out, sums = scale(kernel, x), x.new_empty(2, 3, dtype=torch.float16)
        start(kernel, x, None, sums)
        return out, None, sums, bias

    launcher, bias = Launcher(kernel, body), torch.zeros(16)
    for _ in range(3):
        (out, nothing, sums, same), launched = called(driver, launcher, torch.zeros(3, 16), bias)
    assert launcher.runs == 2 and nothing is None and same is bias
    assert (sums.shape, sums.dtype) == ((2, 3), torch.float16)
    assert [arguments(each)[2] for each in launched] == [out.data_ptr(), sums.data_ptr()]


@pytest.mark.parametrize("results", [lambda out: (out,), lambda out: out], ids=["a tuple of one", "one"])
def test_a_tuple_of_one_is_one(driver, kernel, results):
    launcher = Launcher(kernel, lambda kernel, x: results(scale(kernel, x)))
    found = [type(launcher.call(torch.zeros(16))) for _ in range(3)]
    assert launcher.runs == 2 and found == 3 * [type(results(torch.zeros(1)))]


def test_views_begin_where_they_do(driver, kernel):
    def body(kernel, x):
        room = x.new_empty(96)
        start(kernel, x[1], room[32:].view(4, 16)[1], room.reshape(6, 16))
        return room

    launcher = Launcher(kernel, body)
    for _ in range(3):
        x = torch.zeros(2, 16)
        room, [launched] = called(driver, launcher, x)
    assert launcher.runs == 2
    assert arguments(launched)[:3] == (x.data_ptr() + 64, room.data_ptr() + 4 * 48, room.data_ptr())


OTHERWISE = {
    "another shape": (torch.zeros(5, 16),),
    "other strides": (torch.zeros(16, 3).T,),
    "another dtype": (torch.zeros(3, 16, dtype=torch.bfloat16),),
    "another beginning": (torch.zeros(49)[1:].view(3, 16),),
    "another tensor in place of none": (torch.zeros(3, 16), torch.zeros(16)),
    "another number": (torch.zeros(3, 16), None, 2.0),
    "a number of another type": (torch.zeros(3, 16), None, 1),
}


@pytest.mark.parametrize("given", OTHERWISE.values(), ids=OTHERWISE)
def test_what_looks_otherwise_is_another_kind(driver, kernel, given):
    launcher = Launcher(kernel)
    for _ in range(3):
        launcher.call(torch.zeros(3, 16), None, 1.0)
    _, [wanted] = called(driver, Launcher(kernel), *given)
    assert launcher.runs == 2
    _, [launched] = called(driver, launcher, *given)
    assert launcher.runs == 3
    assert launched[:6] == wanted[:6] and arguments(launched)[3:] == arguments(wanted)[3:]
    launcher.call(torch.zeros(3, 16), None, 1.0)
    assert launcher.runs == 3


def test_the_switch_for_tf32_makes_another_kind(driver, kernel):
    launcher, matmul = Launcher(kernel), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for matmul.fp32_precision in ("ieee", "tf32"):
            for _ in range(3):
                launcher.call(torch.zeros(16))
                launcher.call(torch.zeros(16, dtype=torch.float16))
    finally:
        matmul.fp32_precision = before
    assert launcher.runs == 2 * 2 + 2


def test_another_device_is_another_kind(driver, kernel):
    launcher = Launcher(kernel)
    functions = []
    for driver.device in (0, 1):
        for _ in range(3):
            _, [launched] = called(driver, launcher, torch.zeros(16))
        functions.append(launched[4])
    assert launcher.runs == 4 and functions[0] != functions[1]


def test_the_stream_is_the_current_one(driver, kernel):
    launcher = Launcher(kernel)
    for driver.stream in (0, 0, 0, 7):
        _, [launched] = called(driver, launcher, torch.zeros(16))
    assert launcher.runs == 2 and launched[3] == 7


def test_scalars_are_allocated_too(driver, kernel):
    launcher = Launcher(kernel, lambda kernel, x: (scale(kernel, x), x.new_empty(())))
    shapes = [tuple(result.shape for result in launcher.call(torch.zeros(16))) for _ in range(4)]
    assert launcher.runs == 2 and shapes == 4 * [((16,), ())]


def test_what_launches_nothing_is_repeated(driver, kernel):
    launcher = Launcher(kernel, lambda kernel, x: (x.new_empty(0, 5), x.new_empty(5, 0, 3)))
    shapes = [tuple(result.shape for result in launcher.call(torch.zeros(0, 3))) for _ in range(4)]
    assert launcher.runs == 2 and shapes == 4 * [((0, 5), (5, 0, 3))] and not driver.launches


@pytest.mark.parametrize("allocates_as_graphs_do", [True, False])
def test_plans_hold_no_memory(driver, kernel, monkeypatch, allocates_as_graphs_do):
    """Or a CUDA graph that is being captured would keep its own for them."""
    if not allocates_as_graphs_do:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    launcher = Launcher(kernel)
    for _ in range(2):
        launcher.call(torch.zeros(3, 16))
    [plan] = native.Kinds._all[-1].values()
    [allocate] = plan.allocations
    held = [part for part in (allocate.func.__self__, *allocate.args) if isinstance(part, torch.Tensor)]
    assert len(held) == (not allocates_as_graphs_do) and not any(part.untyped_storage().nbytes() for part in held)


@pytest.mark.parametrize("most", [1 << 24, 4], ids=["together", "too large to be"])
def test_what_is_not_given_back_is_allocated_together(driver, kernel, monkeypatch, most):
    monkeypatch.setattr(replay, "MAX_TOGETHER", most)

    def body(kernel, x):
        first, second = x.new_empty(3, 5, dtype=torch.float16), x.new_empty(7, 16)
        start(kernel, x, first, second[2])
        out = scale(kernel, second)
        scale(kernel, second.view(16, 7), first)
        return out

    launcher = Launcher(kernel, body)
    for _ in range(4):
        out, launches = called(driver, launcher, torch.zeros(3, 16))
    assert launcher.runs == 2 and out.shape == (7, 16) and out.dtype == torch.float32
    [plan] = native.Kinds._all[-1].values()
    assert len(plan.allocations) == (4 if most == 4 else 2)
    (_, first, second_2), (second, none, result), (same, bias, _) = (arguments(each)[:3] for each in launches)
    assert second_2 == second + 4 * 32 and (same, bias, none, result) == (second, first, None, out.data_ptr())
    assert most == 4 or second - first == 512


def test_no_more_is_kept_than_is_allowed(driver, kernel, monkeypatch):
    monkeypatch.setattr(replay, "MAX_KINDS", 3)
    launcher = Launcher(kernel)
    for size in [*range(16, 160, 16)] * 2:
        _, [launched] = called(driver, launcher, torch.zeros(size))
        assert arguments(launched)[3] == size and 0 < len(native.Kinds._all[-1]) <= 3


def test_a_call_within_a_device_s_context_is_repeated_too(driver, kernel):
    launcher = Launcher(kernel)
    with torch.device("cpu"):
        for _ in range(4):
            out, [launched] = called(driver, launcher, torch.zeros(16))
    assert launcher.runs == 2 and arguments(launched)[2] == out.data_ptr()


@pytest.mark.parametrize("noted_in", [torch.enable_grad, torch.inference_mode])
def test_nothing_has_a_gradient(driver, kernel, noted_in):
    launcher = Launcher(kernel)
    with noted_in():
        for _ in range(2):
            launcher.call(torch.zeros(16))
    with torch.inference_mode():
        inference = launcher.call(torch.zeros(16))
    outs = [launcher.call(x) for x in (torch.zeros(16, requires_grad=True), torch.nn.Parameter(torch.zeros(16)))]
    assert launcher.runs == 2 and inference.is_inference()
    assert not any(out.requires_grad or out.is_inference() for out in outs)


def test_another_thread_s_launches_are_not_noted(driver, kernel):
    other = Launcher(JITFunction(scaled))

    def body(kernel, x):
        thread = Thread(target=other.run, args=(x,))
        thread.start()
        thread.join()
        return scale(kernel, x)

    launcher = Launcher(kernel, body)
    launched = [len(called(driver, launcher, torch.zeros(16))[1]) for _ in range(4)]
    assert launcher.runs == other.runs == 2 and launched == [2, 2, 1, 1]


def test_views_that_are_gone_are_not_mistaken_for_others(driver, kernel):
    """Python gives a new object the identity of one that is gone."""

    def body(kernel, x):
        for place in range(3):
            start(kernel, x[place], None, x[2 - place])
        return x.new_empty(3)

    launcher = Launcher(kernel, body)
    for _ in range(3):
        x = torch.zeros(3, 16)
        _, launched = called(driver, launcher, x)
    assert launcher.runs == 2
    rows = [row.data_ptr() for row in x]
    assert [(arguments(each)[0], arguments(each)[2]) for each in launched] == list(zip(rows, rows[::-1], strict=True))


def test_threads_call_what_they_are_given(driver, kernel):
    launchers, wrong = [Launcher(JITFunction(scaled)) for _ in range(4)], []

    def work(launcher, size):
        wrong.extend(size for _ in range(50) if launcher.call(torch.zeros(size)).shape != (size,))

    threads = [Thread(target=work, args=(launcher, 16 * place)) for place, launcher in enumerate(launchers, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [launcher.runs for launcher in launchers] == 4 * [2]
    assert sorted(arguments(each)[3] for each in driver.launches) == sorted(50 * [16, 32, 48, 64])
