"""Calls of launchers that are made in full: what else they do, or who watches them, would be lost."""

import pytest
import torch
from launchers import SETTINGS, Launcher, arguments, called, scale
from triton import knobs

from vlcore import native
from vlcore.bench.launches import watched

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


def test_what_the_launcher_raises_is_raised(driver, kernel):
    def body(kernel, x):
        raise RuntimeError("out of resources")

    launcher = Launcher(kernel, body)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of resources"):
            launcher.call(torch.zeros(16))
    assert launcher.runs == 3 and not driver.launches
