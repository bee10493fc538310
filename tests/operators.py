"""What is asked of every operator, on every backend: right values and gradients, a well-formed torch op, no breaks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
from accuracy import assert_as_accurate, error_of
from conftest import DEVICE
from torch import Tensor

from vlcore.kernels import launch
from vlcore.ops.dispatch import TORCH, Kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of each function that is tested: on a GPU the third repeats the launches of the second (kernels/replay.py).
CALLS = 1 if DEVICE == "cpu" else 3


# Of a parameter that is refused for its values.
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's values are not looked at, which would make it wait")


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def here(value):
    """A tensor on the device of the tests; what is on "meta", or no tensor, as it is."""
    return value if not isinstance(value, Tensor) or value.is_meta else value.to(DEVICE)


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


def _random_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    # The same gradients for every dtype: those that bfloat16 and float16 both hold.
    return [(grad * 16).round().clamp(-64, 64) / 16 for grad in grads]


def values_and_gradients(function: Callable, arguments: Sequence, grads: Sequence[Tensor] = ()) -> list[Tensor]:
    """What a function returns and its gradient for every floating tensor among the arguments; `grads` are its
    outputs', random ones unless given."""
    arguments = tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = grads or _random_gradients(outputs)
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)]


def assert_matches(function: Callable, reference: Callable, *arguments) -> None:
    """Values and gradients of `function` are as accurate as torch's own; float64 is the truth."""
    with poisoned_memory():
        found = [values_and_gradients(function, arguments) for _ in range(CALLS)]
    low, exact = in_two_precisions(reference, arguments)
    elsewhere = cache(partial(errors_of_torch, reference, arguments))
    for actual in found:
        for place, (got, same_dtype, truth) in enumerate(zip(actual, low, exact, strict=True)):
            assert_as_accurate(got, same_dtype, truth, lambda place=place: elsewhere()[place])


def in_two_precisions(reference: Callable, arguments: tuple) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients in the arguments' dtype and in float64."""
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    return values_and_gradients(reference, arguments), values_and_gradients(reference, wide)


def errors_of_torch(reference: Callable, arguments: tuple, draws: int = 8) -> list[float]:
    """For each value and gradient the largest error of torch's own over inputs with their numbers shuffled: of one
    input's it may come near by chance, on one processor and not on the next."""
    generator = torch.Generator().manual_seed(2)

    def shuffled(argument):
        if not (isinstance(argument, Tensor) and argument.is_floating_point()):
            return argument
        places = torch.randperm(argument.numel(), generator=generator).to(argument.device)
        return argument.flatten()[places].view(argument.shape)

    errors = []
    for _ in range(draws):
        pairs = zip(*in_two_precisions(reference, tuple(map(shuffled, arguments))), strict=True)
        errors.append([error_of(low, exact) for low, exact in pairs])
    return [max(errors_of_one) for errors_of_one in zip(*errors, strict=True)]


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
