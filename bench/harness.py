"""One comparison of an operator: held against float64 first, then timed beside what a user would run instead."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from vlcore import native, ops
from vlcore.bench.accuracy import assert_as_accurate
from vlcore.bench.alternatives import Alternative
from vlcore.bench.peers import TORCH_BACKEND, TORCH_COMPILED
from vlcore.bench.timing import Roofline, Spread, computed, waited
from vlcore.ops.dispatch import TORCH

Inputs = tuple | Sequence[tuple]
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a case: normal numbers of one dtype on one device."""

    dtype: torch.dtype
    device: str

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device).mul_(scale).to(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def title(operator: str, trains: bool) -> str:
    return f"{operator}, forward and backward" if trains else operator


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one shape.

    Attributes:
        operator: its name in vlcore.ops.
        shape: what a reader is told of the inputs.
        inputs: makes the positional arguments; several tuples are taken in turn, so that what a model's step reads
            from memory is read from memory here.
        function: called with the inputs and backend=; the operator itself, unless it has other arguments to be given.
        peers: what a user would run instead, by name: called with the inputs. torch.compile of the reference is not
            among them; every case has it.
        flops: floating point operations of one call; where memory bounds it, roughly.
        elements, bytes: what one call cannot but read and write, where memory bounds it: in elements of the dtype, and
            in bytes beside them.
        computes: whether arithmetic bounds it all the same.
        trains: forward and backward are timed, and the gradients compared too.
    """

    operator: str
    shape: str
    inputs: Callable[[Maker], Inputs]
    function: Callable[..., Result] | None = None
    peers: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    flops: float = 0
    elements: float = 0
    bytes: float = 0
    computes: bool = False
    trains: bool = False

    @property
    def title(self) -> str:
        return title(self.operator, self.trains)

    def backends(self, device: str) -> list[str]:
        """Our kernels that run on a device at their own speed, which an interpreter's is not. Those of CUDA C++ are not
        in every build, and what xformers does is a peer's."""
        kernels = import_module(f"vlcore.ops.{self.operator}").KERNELS
        left_out = {"xformers", "cuda"} if native.cuda is None else {"xformers"}
        return [name for name in kernels if (name == "cpp") == (device == "cpu") and name not in left_out]

    def on(self, backend: str) -> Callable[..., Result]:
        function = self.function or getattr(ops, self.operator)
        return lambda *inputs: function(*inputs, backend=backend)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of a case.

    Attributes:
        ours: which of the names in `seconds` is ours; of several backends the fastest.
        seconds: of each backend and peer, the median.
        quartiles: below and above each median.
        bytes: that one call cannot but move, where memory bounds it.
        traffic: bytes of all that a call takes and gives.
        memory: bytes that each needs while it runs, where that was measured.
        failed: what a peer raised that is not timed for it.
        limit: what the machine could do at best, shortly before.
        commit: of what was measured, once bench/record.py has said it.
    """

    operator: str
    shape: str
    dtype: str
    trains: bool
    ours: str
    seconds: dict[str, float]
    quartiles: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    flops: float = 0
    bytes: float = 0
    traffic: float = 0
    memory: Mapping[str, int | None] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    limit: Roofline = Roofline(math.inf, math.inf)
    commit: str = ""

    @property
    def title(self) -> str:
        return title(self.operator, self.trains)

    @property
    def best_peer(self) -> str:
        """The fastest of what else there is."""
        others = {name: time for name, time in self.seconds.items() if name != self.ours}
        return min(others, key=lambda name: others[name])

    def ratio(self, peer: str) -> float:
        """How many times as fast ours is."""
        return self.seconds[peer] / self.seconds[self.ours]

    @property
    def rate(self) -> str:
        """FLOP/s or bytes/s, with the percentage of the limit."""
        time, limit = self.seconds[self.ours], self.limit
        if self.bytes:
            rate = self.bytes / time
            shown = f"{rate / 1e12:.2f} TB/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GB/s"
            return f"{shown} ({rate / limit.bandwidth:.0%})"
        rate = self.flops / time
        shown = f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"
        return f"{shown} ({rate / limit.flops:.0%})" if self.flops else ""


def split(times: Mapping[str, Spread]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The medians and the quartiles of what was timed."""
    medians = {name: spread.median for name, spread in times.items()}
    return medians, {name: (spread.low, spread.high) for name, spread in times.items()}


def contenders(case: Case, device: str, compiled: bool) -> dict[str, Callable[..., object]]:
    """What a case's backends are compared with on a device: our reference, that compiled, and the peers that fit."""
    every: dict[str, Callable[..., object]] = {TORCH_BACKEND: case.on(TORCH)}
    if compiled:
        # What was compiled for other cases would count against the number of variants that torch makes.
        torch.compiler.reset()
        every[TORCH_COMPILED] = torch.compile(case.on(TORCH), dynamic=False)
    for name, peer in case.peers.items():
        if not isinstance(peer, Alternative) or peer.is_to_be_had(device, compiled):
            every[name] = peer
    return every


def measure(case: Case, make: Maker, compiled: bool = False) -> Measurement:
    """Check every backend of a case, and then time it against the peers; one that raises is left out, and named.

    Raises:
        AssertionError: a backend is not as accurate as torch; nothing is timed then.
    """
    turns, backends = _turns(case, make), case.backends(make.device)
    outputs = check(case, turns[0], backends)
    functions = {name: _timed(case, case.on(name), turns) for name in backends}
    failed = {}
    for name, contender in contenders(case, make.device, compiled).items():
        function = _timed(case, contender, turns)
        try:
            function()
        except Exception as error:  # of other people's code, which can raise anything
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            functions[name] = function
    times = computed(functions) if make.device == "cuda" else waited(functions, make.device)
    seconds, quartiles = split(times)
    bound = case.elements * make.dtype.itemsize + case.bytes
    return Measurement(
        operator=case.operator,
        shape=case.shape,
        dtype=dtype_name(make.dtype),
        trains=case.trains,
        ours=min(backends or [TORCH_BACKEND], key=lambda name: seconds[name]),
        seconds=seconds,
        quartiles=quartiles,
        flops=case.flops,
        bytes=0 if case.computes else bound,
        traffic=bound or sum(x.nbytes for x in (*turns[0], *outputs) if isinstance(x, Tensor)),
        failed=failed,
    )


def prepared(case: Case, make: Maker, name: str) -> Callable[[], object]:
    """A backend of a case, checked, or one of its contenders: ready to be timed by itself, to the end of its work."""
    turns = _turns(case, make)
    if name in case.backends(make.device):
        check(case, turns[0], [name])
        function = _timed(case, case.on(name), turns)
    else:
        function = _timed(case, contenders(case, make.device, name == TORCH_COMPILED)[name], turns)
    if make.device != "cuda":
        return function

    def run_to_the_end() -> None:
        function()
        torch.cuda.synchronize()

    return run_to_the_end


def _turns(case: Case, make: Maker) -> Sequence[tuple]:
    torch.manual_seed(0)
    inputs = case.inputs(make)
    return [inputs] if isinstance(inputs, tuple) else inputs


def check(case: Case, inputs: tuple, backends: Sequence[str]) -> tuple[Tensor, ...]:
    """Hold what backends give for a case against float64; returns what the reference gives.

    Raises:
        AssertionError: one is not as accurate as torch.
    """
    wide = tuple(_widened(x) for x in inputs)
    exact, baseline = (values(case, case.on(TORCH), given) for given in (wide, inputs))
    for backend in backends:
        for got, same_dtype, truth in zip(values(case, case.on(backend), inputs), baseline, exact, strict=True):
            assert_as_accurate(got, same_dtype, truth)
    return baseline


def _timed(case: Case, function: Callable[..., object], turns: Sequence[tuple]) -> Callable[[], object]:
    next_inputs = cycle(turns).__next__
    return lambda: values(case, function, next_inputs())


def values(case: Case, function: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    """What a function returns; where the case trains, also its gradient for ones at every output."""
    if not case.trains:
        with torch.no_grad():
            return _as_tuple(function(*inputs))
    given = tuple(x.detach().requires_grad_() if _is_floating(x) else x for x in inputs)
    outputs = _as_tuple(function(*given))
    wanted = [x for x in given if _is_floating(x)]
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], materialize_grads=True)
    return *(y.detach() for y in outputs), *grads


def _widened(value: Any) -> Any:
    """Floating tensors in float64, those of a tuple of weights too."""
    if isinstance(value, ops.BlockWeights):
        return ops.BlockWeights(*map(_widened, value))
    return value.double() if _is_floating(value) else value


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_tuple(values: Result) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)
