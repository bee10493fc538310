"""What is asked of every operator, on every backend: right values and gradients, a well-formed torch op, no breaks."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import pytest
import torch
from accuracy import assert_as_accurate
from conftest import DEVICE
from torch import Tensor

from vlcore.kernels import launch
from vlcore.ops.dispatch import TORCH, Kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous: every second element of a tensor whose others are NaN."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


def shifted(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an address that is aligned to one element only."""
    place = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return place.copy_(tensor)


def amid_nan(tensor: Tensor) -> Tensor:
    """The same values, contiguous, with NaN in memory before and behind them."""
    return torch.nn.functional.pad(tensor.flatten(), (64, 64), value=torch.nan)[64:-64].view(tensor.shape)


def skip_if_refused(kernels: Mapping[str, Kernel], backend: str, *arguments) -> None:
    if backend != TORCH and (reasons := kernels[backend].refusals(*arguments)):
        pytest.skip("; ".join(reasons))


def launch_with(monkeypatch: pytest.MonkeyPatch, **constants: int) -> None:
    """Triton's kernels are launched with these constants in place of their tables', so that little data has many
    blocks."""
    settings = launch.settings

    def changed(*kernel, **sizes):
        entry = settings(*kernel, **sizes)
        return entry | {name: value for name, value in constants.items() if name in entry}

    monkeypatch.setattr(launch, "settings", changed)


@contextmanager
def poisoned_memory():
    """Memory that a kernel forgets to write holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def values_and_gradients(function: Callable, arguments: tuple) -> list[Tensor]:
    """What a function returns and its gradient for every floating tensor among the arguments."""
    arguments = tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    # The same gradients for every dtype: those that bfloat16 and float16 both hold.
    grads = [(grad * 16).round().clamp(-64, 64) / 16 for grad in grads]
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)]


def assert_matches(function: Callable, reference: Callable, *arguments) -> None:
    """Values and gradients of `function` are as accurate as torch's own; float64 is the truth."""
    with poisoned_memory():
        actual = values_and_gradients(function, arguments)
    low = values_and_gradients(reference, arguments)
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    exact = values_and_gradients(reference, wide)
    for got, same_dtype, truth in zip(actual, low, exact, strict=True):
        assert_as_accurate(got, same_dtype, truth)


def assert_strides_do_not_matter(function: Callable, *arguments) -> None:
    """Values and gradients are the same for inputs that are not contiguous."""
    spread = tuple(strided(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    pairs = zip(values_and_gradients(function, spread), values_and_gradients(function, arguments), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted)


def assert_gradcheck(function: Callable, *arguments) -> None:
    """The gradients of a reference are those of finite differences, in float64."""
    wide = [
        a.detach().double().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    assert torch.autograd.gradcheck(function, wide)


def assert_well_formed(operator: str, *arguments) -> tuple[Tensor, ...]:
    """vlcore::<operator> passes opcheck; returns its outputs."""
    op = getattr(torch.ops.vlcore, operator).default
    torch.library.opcheck(op, arguments)
    outputs = op(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_compiles(function: Callable, *variants: tuple) -> None:
    """One graph without breaks gives the values and gradients of eager; sizes that change become dynamic in it."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for arguments in variants:
        pairs = zip(values_and_gradients(compiled, arguments), values_and_gradients(function, arguments), strict=True)
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted)
