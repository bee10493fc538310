"""Calls of launchers that are repeated: the same launches on tensors that look the same."""

from threading import Thread
from unittest.mock import patch

import pytest
import torch

from vlcore import native
from vlcore.kernels import launch

if not launch.AVAILABLE:
    pytest.skip("Triton is not installed", allow_module_level=True)
if native.signature() is None:
    pytest.skip("this build cannot tell what tensors look like: no call is repeated", allow_module_level=True)

import triton.language as tl
from recorder import ARGUMENTS_BEFORE, Recorder, compile_nothing
from triton import knobs
from triton.runtime.jit import JITFunction

from vlcore.bench.launches import watched
from vlcore.bench.stand_in import in_place_of_a_gpu
from vlcore.kernels import direct_launch, replay

SETTINGS = {"BLOCK": 16, "num_warps": 2}


def scaled(x_ptr, bias_ptr, out_ptr, size, scale, BLOCK: tl.constexpr):
    pass


@pytest.fixture
def kernel():
    return JITFunction(scaled)


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(direct_launch, "_kept", {})
    monkeypatch.setattr(launch, "INTERPRETED", False)
    recorder = Recorder()
    with in_place_of_a_gpu(recorder, "sm_90"), patch.object(JITFunction, "_do_compile", compile_nothing):
        yield recorder


class Launcher:
    """As a kernel's own, and counts how often it runs."""

    def __init__(self, kernel, body=None):
        self.kernel, self.body, self.runs = kernel, body, 0
        self.call = replay.remembered(self.run)

    def run(self, *arguments):
        self.runs += 1
        return (self.body or scale)(self.kernel, *arguments)


def start(kernel, x, bias, out, scale=1.0):
    direct_launch.run(kernel, (x.numel() // 16 + 1,), (x, bias, out), (x.numel(), scale), SETTINGS)


def scale(kernel, x, bias=None, factor=1.0):
    out = torch.empty_like(x)
    start(kernel, x, bias, out, factor)
    return out


def arguments(launched):
    return launched[ARGUMENTS_BEFORE:]


def called(driver, launcher, *given):
    """What a call gives back and launches."""
    driver.launches.clear()
    return launcher.call(*given), list(driver.launches)


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


DOES_MORE = {
    "fills": lambda kernel, x: scale(kernel, x).zero_(),
    "asks for zeros": lambda kernel, x: scale(kernel, x.new_zeros(16)),
    "copies": lambda kernel, x: scale(kernel, x.T.contiguous()),
    "copies to look at it otherwise": lambda kernel, x: scale(kernel, x.T.reshape(48)),
    "converts": lambda kernel, x: scale(kernel, x.to(torch.float16)),
    "sums": lambda kernel, x: (scale(kernel, x), x.sum(0)),
    "looks inside": lambda kernel, x: scale(kernel, x, None, 1.0 + x[0, 0].item()),
    "takes a number from inside": lambda kernel, x: scale(kernel, x, None, 1.0 + float(x[0, 0])),
    "has a tensor for an index": lambda kernel, x: scale(kernel, x[torch.tensor(1)]),
    "has a tensor within an index": lambda kernel, x: scale(kernel, x[torch.tensor(1) :, :16]),
    "has a tensor for a size": lambda kernel, x: scale(kernel, x.view(torch.tensor(3), 16)),
    "has a tensor among sizes": lambda kernel, x: scale(kernel, x.new_empty((torch.tensor(3), 16))),
    "has a tensor for the first size": lambda kernel, x: scale(kernel, torch.empty([torch.tensor(3), 16])),
    "has a tensor for a number": lambda kernel, x: scale(kernel, x, None, torch.tensor(2.0)),
    "hands out an address": lambda kernel, x: scale(kernel, x, None, float(x.data_ptr())),
    "launches otherwise": lambda kernel, x: kernel[(1,)](x, None, x, 3, 1.0, **FUSED) and scale(kernel, x),
    "launches on nothing of a tensor": lambda kernel, x: scale(kernel, x[3:]),
    "lists": lambda kernel, x: scale(kernel, x, None, 1.0 + x[0].tolist()[0]),
    "asks whether there is a gradient": lambda kernel, x: scale(kernel, x, None, float(x.requires_grad)),
    "gives back a view": lambda kernel, x: scale(kernel, x).transpose(0, 1),
    "gives back what it has at hand": lambda kernel, x: (scale(kernel, x), torch.ones(3)),
    "allocates with gaps": lambda kernel, x: scale(kernel, torch.empty_strided((3, 16), (32, 1))),
    "allocates in another order": lambda kernel, x: scale(kernel, torch.empty_strided((3, 16), (1, 3))),
    "has tensors from elsewhere": lambda kernel, x: scale(kernel, x, ELSEWHERE),
    "has views of tensors from elsewhere": lambda kernel, x: scale(kernel, x, ELSEWHERE[4:]),
    "launches on what does not begin at 16 bytes": lambda kernel, x: scale(kernel, x, x.view(48)[1:]),
    "gives back a list": lambda kernel, x: [scale(kernel, x)],
    "gives back nothing": lambda kernel, x: [scale(kernel, x)].clear(),
    "gives back none of it": lambda kernel, x: (scale(kernel, x),)[:0],
}
ELSEWHERE = torch.zeros(16)
FUSED = SETTINGS | {"enable_fp_fusion": True}


@pytest.mark.parametrize("body", DOES_MORE.values(), ids=DOES_MORE)
def test_what_does_more_than_allocate_and_launch_is_not_repeated(driver, kernel, body):
    launcher = Launcher(kernel, body)
    results, launched = zip(*(called(driver, launcher, torch.zeros(3, 16)) for _ in range(4)), strict=True)
    assert launcher.runs == 4
    assert len({type(result) for result in results}) == 1 and len({len(launches) for launches in launched}) == 1


def test_scalars_are_allocated_too(driver, kernel):
    launcher = Launcher(kernel, lambda kernel, x: (scale(kernel, x), x.new_empty(())))
    shapes = [tuple(result.shape for result in launcher.call(torch.zeros(16))) for _ in range(4)]
    assert launcher.runs == 2 and shapes == 4 * [((16,), ())]


def test_what_launches_nothing_is_repeated(driver, kernel):
    launcher = Launcher(kernel, lambda kernel, x: (x.new_empty(0, 5), x.new_empty(5, 0, 3)))
    shapes = [tuple(result.shape for result in launcher.call(torch.zeros(0, 3))) for _ in range(4)]
    assert launcher.runs == 2 and shapes == 4 * [((0, 5), (5, 0, 3))] and not driver.launches


def test_a_tensor_given_twice_is_not_taken_for_two_that_look_alike(driver, kernel):
    launcher, x = Launcher(kernel), torch.zeros(16)
    for _ in range(4):
        launcher.call(x, x)
    assert launcher.runs == 4
    launcher.call(torch.zeros(16), torch.zeros(16))
    given = [torch.zeros(16) for _ in range(2)]
    _, [launched] = called(driver, launcher, *given)
    assert launcher.runs == 5
    assert arguments(launched)[:2] == tuple(tensor.data_ptr() for tensor in given)
    _, [launched] = called(driver, launcher, x, x)
    assert arguments(launched)[:2] == (x.data_ptr(), x.data_ptr())


ODD = {
    "a tuple": (16,),
    "a list": [1],
    "a number of more than 64 bits": 2**70,
    "a dtype": torch.float32,
    "a tensor without memory": torch.zeros(16, device="meta"),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_cannot_be_told_apart_is_not_repeated(driver, kernel, odd):
    launcher = Launcher(kernel, lambda kernel, x, odd: scale(kernel, x))
    for _ in range(4):
        launcher.call(torch.zeros(16), odd)
    assert launcher.runs == 4


def test_what_triton_has_to_see_is_not_repeated(driver, kernel):
    launcher, seen = Launcher(kernel), []
    for _ in range(3):
        launcher.call(torch.zeros(16))
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        launcher.call(torch.zeros(16))
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert launcher.runs == 3
    launcher.call(torch.zeros(16))
    assert launcher.runs == 3
    kernel.add_pre_run_hook(lambda *arguments, **settings: seen.append(settings["num_warps"]))
    for _ in range(2):
        launcher.call(torch.zeros(16))
    assert launcher.runs == 5 and seen == [2, 2]


def test_what_watches_launches_sees_those_of_calls_too(driver, kernel):
    launcher, seen = Launcher(kernel), []
    with watched(lambda name, entry, go: seen.append(name) or go()):
        for _ in range(3):
            launcher.call(torch.zeros(16))
    assert launcher.runs == 3 and seen == 3 * ["scaled"]


def test_what_was_watched_is_noted_anew(driver, kernel):
    launcher = Launcher(kernel)
    for _ in range(3):
        launcher.call(torch.zeros(16))
    with watched(lambda name, entry, go: go()):
        pass
    for _ in range(3):
        launcher.call(torch.zeros(16))
    assert launcher.runs == 4


def test_tensors_that_torch_allocates_elsewhere_are_launched_by_triton(driver, kernel):
    """An allocator of somebody else's need not begin at a multiple of 16 bytes."""
    launcher = Launcher(kernel)
    for _ in range(3):
        launcher.call(torch.zeros(16))
    driver.launches.clear()
    [kind] = native.Kinds._all[-1]
    plan = native.Kinds._all[-1][kind]
    native.Kinds._all[-1][kind] = plan._replace(allocations=(lambda: torch.empty(17)[1:],))
    launcher.call(torch.zeros(16))
    assert launcher.runs == 3 and len(driver.launches) == 1


def test_plans_hold_no_memory(driver, kernel):
    """Or a CUDA graph that is being captured would keep its own for them."""
    launcher = Launcher(kernel)
    for _ in range(2):
        launcher.call(torch.zeros(3, 16))
    [plan] = native.Kinds._all[-1].values()
    [allocate] = plan.allocations
    assert allocate.func.__self__.untyped_storage().nbytes() == 0


def test_no_more_is_kept_than_is_allowed(driver, kernel, monkeypatch):
    monkeypatch.setattr(replay, "MAX_KINDS", 3)
    launcher = Launcher(kernel)
    for size in [*range(16, 160, 16)] * 2:
        _, [launched] = called(driver, launcher, torch.zeros(size))
        assert arguments(launched)[3] == size and 0 < len(native.Kinds._all[-1]) <= 3


def test_what_the_launcher_raises_is_raised(driver, kernel):
    def body(kernel, x):
        raise RuntimeError("out of resources")

    launcher = Launcher(kernel, body)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of resources"):
            launcher.call(torch.zeros(16))
    assert launcher.runs == 3 and not driver.launches


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
