"""Calling a launcher again without computing again what follows from how its arguments look.

A launcher looks at shapes and strides, chooses settings from a table, allocates, and launches: the same at every call
with arguments that look the same. So the second call of a kind is noted, and if it only allocates and launches, those
behind it do just that. A launcher need not know of it: what else it asks torch for is seen, and nothing is kept then.
What it would do without asking torch, such as to call C++, cannot be seen, and is not for launchers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import driver

from vlcore import native

from . import direct_launch, launch

# Kinds of calls of one launcher; what is forgotten is noted again.
MAX_KINDS = 1024
# Bytes of the largest tensor that is allocated together with others, and what each begins at a multiple of.
MAX_TOGETHER = 1 << 24
_ALIGNMENT = 512

_ALLOCATES = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)
# Unless they copy.
_VIEWS = tuple(
    getattr(Tensor, name)
    for name in ("__getitem__", "contiguous", "flatten", "permute", "reshape", "to", "transpose", "unflatten", "view")
)
# What a tensor looks like, which `native.signature` tells apart, or has no part in what is launched.
_LOOKS = (
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cpu", "is_cuda", "ndim", "shape")),
    *(getattr(Tensor, name) for name in ("dim", "element_size", "is_contiguous", "numel", "size", "stride")),
)


class _Plan(NamedTuple):
    """What calls of a kind do. Small tensors that are not given back are allocated as one, with a place for each."""

    allocations: tuple[Callable[[], Tensor], ...] = ()
    hooks: tuple[list, ...] = ()  # of the kernels, which Triton has to call
    repeat: Callable[..., Any] | None = None  # of csrc/launch_again.cpp; None where there is no plan


# Told apart by `is`.
_SEEN_ONCE, _NOT_TO_BE_REPEATED = _Plan(), _Plan()


def remembered(launcher: Callable) -> Callable:
    """`launcher`, whose calls are repeated.

    What it does may follow from how its arguments look, the current device, launch tables, and torch's switch for TF32,
    but not from what tensors hold. Tensors that it allocates and that it is given may not be told apart by `is`.
    """
    if launch.INTERPRETED:
        return launcher
    kinds = native.Kinds(MAX_KINDS)

    def call(*arguments):
        if direct_launch.is_observed():
            return launcher(*arguments)
        active = driver.active
        device = active.get_current_device()
        kind = native.signature(*arguments, device, _tf32(arguments[0]))
        if kind is None:
            return launcher(*arguments)
        plan = kinds.get(kind)
        if plan is None or plan is _SEEN_ONCE:
            return _note(launcher, arguments, kinds, kind)
        if plan.repeat is not None and not any(plan.hooks):
            results = plan.repeat(active.get_current_stream(device), plan.allocations, *arguments)
            if results is not None:
                return results
        return launcher(*arguments)

    return call


def _tf32(tensor: Tensor) -> str | None:
    """The switch, where it matters."""
    return torch.backends.cuda.matmul.fp32_precision if tensor.dtype == torch.float32 else None


def _note(launcher: Callable, arguments: tuple, kinds: native.Kinds, kind: bytes):
    if kind not in kinds:
        kinds.keep(kind, _SEEN_ONCE)
        return launcher(*arguments)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        # Which of them was launched with could not be told.
        return launcher(*arguments)
    with _Calls(arguments) as calls, direct_launch.noted() as launches:
        results = launcher(*arguments)
    kinds.keep(kind, _plan(calls, launches, results) or _NOT_TO_BE_REPEATED)
    return results


class _Calls(TorchFunctionMode):
    """What torch is asked for, and where the tensors begin that it is asked with."""

    def __init__(self, arguments: tuple) -> None:
        super().__init__()
        self.arguments = arguments
        self.allocated: list[Tensor] = []
        self.views: list[Tensor] = []  # kept, or others would be mistaken for them
        # By id, the tensor whose memory another lies in, and how many bytes behind its beginning.
        self.begins = {id(argument): (argument, 0) for argument in (*arguments, None)}
        self.does_more = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = args[0] if args and isinstance(args[0], Tensor) else None
        others = args if first is None else args[1:]
        if not _is_without_tensors((*others, *(kwargs or {}).values())):
            self.does_more = True  # an index, say, or a size, that is read
        elif function in _ALLOCATES:
            self.begins[id(result)] = result, 0
            self.allocated.append(result)
        elif function in _VIEWS and id(first) in self.begins and _is_within(result, first):
            whole, offset = self.begins[id(first)]
            self.begins[id(result)] = whole, offset + result.data_ptr() - first.data_ptr()
            self.views.append(result)
        elif function not in _LOOKS:
            self.does_more = True
        return result


def _is_without_tensors(value: object) -> bool:
    if isinstance(value, slice):
        value = value.start, value.stop, value.step
    return all(map(_is_without_tensors, value)) if isinstance(value, (tuple, list)) else not isinstance(value, Tensor)


def _is_within(result: Tensor, tensor: Tensor) -> bool:
    """Whether it is a view of some of its memory."""
    return result.numel() > 0 and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def _plan(calls: _Calls, launches: list[direct_launch.Launch], results) -> _Plan | None:
    """None where a call is more than can be repeated."""
    alone = isinstance(results, Tensor)
    given_back = (results,) if alone else results
    known = {id(each) for each in (*calls.arguments, *calls.allocated, None)}
    if (
        calls.does_more
        or not given_back
        or type(given_back) is not tuple
        or not known.issuperset(map(id, given_back))
        or not all(each.kept and _is_without_tensors(each.numbers) for each in launches)
        or not all(id(tensor) in calls.begins for each in launches for tensor in each.tensors)
        or not all(map(_is_packed, calls.allocated))
    ):
        return None
    returned = set(map(id, given_back))
    offsets, room = _together([each for each in calls.allocated if id(each) not in returned])
    allocated = [each for each in calls.allocated if id(each) not in offsets] + room
    whole = (*calls.arguments, *allocated, None)
    places = {id(each): (place, 0) for place, each in enumerate(whole)}
    places |= {each: (len(whole) - 2, offset) for each, offset in offsets.items()}

    def place(tensor: Tensor | None) -> tuple[int, int]:
        of, behind = calls.begins[id(tensor)]
        found, offset = places[id(of)]
        return found, offset + behind

    repeat = native.cpp.Repetition(
        tuple((each.kept, each.grid, tuple(map(place, each.tensors)), each.numbers) for each in launches),
        [places[id(result)][0] for result in given_back],
        alone,
    )
    return _Plan(tuple(map(_like, allocated)), tuple(each.kernel.pre_run_hooks for each in launches), repeat)


def _together(tensors: list[Tensor]) -> tuple[dict[int, int], list[Tensor]]:
    """Where each of them, by its id, begins in one that has room for them all, and that one; nothing for a single one.
    Large ones are left out: where they are written to, it is not the host that takes the time."""
    offsets, size = {}, 0
    for tensor in tensors:
        if tensor.nbytes <= MAX_TOGETHER and tensor.device == tensors[0].device:
            offsets[id(tensor)] = size
            size += launch.ceil_div(tensor.nbytes, _ALIGNMENT) * _ALIGNMENT
    if len(offsets) < 2:
        return {}, []
    return offsets, [torch.empty(size, dtype=torch.uint8, device=tensors[0].device)]


def _like(tensor: Tensor) -> Callable[[], Tensor]:
    """What allocates others like it, and holds no memory meanwhile."""
    # What torch's compiled graphs allocate by, on the current device, takes half of new_empty's time.
    allocate = getattr(torch._C._dynamo.guards, f"_empty_strided_{tensor.device.type}", None)
    if allocate and tensor.device.index in (None, driver.active.get_current_device()):
        return partial(allocate, tuple(tensor.shape), tensor.stride(), tensor.dtype)
    none_of_it = torch.empty(0, device=tensor.device, dtype=tensor.dtype)
    # Sizes one by one are taken in half the time; for no dimensions there are none to take.
    return partial(none_of_it.new_empty, *tensor.shape) if tensor.ndim else partial(none_of_it.new_empty, ())


def _is_packed(tensor: Tensor) -> bool:
    """Whether it is laid out as what `_like` allocates: is_contiguous leaves the strides of sizes of one open."""
    stride = 1
    for size, given in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if given != stride:
            return False
        stride *= max(size, 1)
    return True
