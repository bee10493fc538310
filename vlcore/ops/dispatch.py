"""Declaring operators to torch, and choosing which implementation of one runs.

An operator lists its kernels in order of preference; behind them all stands its torch reference, which runs
anything. `choose` returns the first kernel that accepts the inputs, or the one that the caller asked for.

Kernels have one gradient, of one incoming gradient or of a batch of them. Transforms of torch.func and forward-mode
derivatives look into an operator, for which "auto" takes the reference, as create_graph=True has to ask for by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import profiler as _profiler
from torch.overrides import BaseTorchFunctionMode

from vlcore import native
from vlcore.ops import autocast

TORCH = "torch"
AUTO = "auto"
CPP = "cpp"
# Kinds of arguments of one operator; what is forgotten is decided again.
MAX_KNOWN = 4096

_is_compiling = torch.compiler.is_compiling
_is_traced = torch._C._is_tracing
_increment_version = torch._C._increment_version
_library = torch.library.Library("vlcore", "FRAGMENT")


def _always(*arguments) -> bool:
    return True


@dataclass(frozen=True)
class Kernel:
    """One compiled implementation of an operator.

    Attributes:
        forward, backward: called with the arguments of the operator's torch ops, less the backend. An operator that
            has no op for its backward has None there.
        refusals: takes the operator's arguments and returns why the kernel cannot run them: no reasons, it can.
        worthwhile: takes the same, and says whether "auto" should take the kernel where it can run; what it asks of
            sizes is asked through `known`.
    """

    forward: Callable
    backward: Callable | None
    refusals: Callable[..., list[str]]
    worthwhile: Callable[..., bool] = _always


def choose(operator: str, kernels: Mapping[str, Kernel], requested: str, *arguments) -> str:
    """The name of the backend that runs these arguments.

    Raises:
        ValueError: a backend was asked for that this operator does not have, or that refuses the arguments.
    """
    if requested == TORCH:
        return TORCH
    if is_transformed():
        if requested != AUTO:
            within = "within a transform of torch.func or a forward-mode derivative"
            raise ValueError(f'{operator} cannot run on {requested!r} {within}: backend="torch" can.')
        return TORCH
    if requested == AUTO:
        for name, kernel in kernels.items():
            if kernel.worthwhile(*arguments) and not kernel.refusals(*arguments):
                return name
        return TORCH
    if requested not in kernels:
        raise ValueError(f"{operator} has no backend {requested!r}; it has {[*kernels, TORCH]}.")
    if reasons := kernels[requested].refusals(*arguments):
        given = ", ".join(_describe(argument) for argument in arguments if argument is not None)
        raise ValueError(f"{operator} cannot run on {requested!r} with {given}: {'; '.join(reasons)}.")
    return requested


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds: in a graph, for all that it is made for. Where they are symbols, what "auto"
    takes may not depend on them, or the graph would be of the sizes on one side of a limit only."""
    if not (_is_compiling() or isinstance(condition, torch.SymBool)):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def remembered(decide: Callable[..., str]) -> Callable[..., str]:
    """`decide`, which checks arguments and chooses a backend for them, asked once for all that look alike.

    What it says may follow from how arguments look, but neither from what tensors hold nor from whether gradients are
    recorded. What it raises, it raises each time.
    """
    known = native.Kinds(MAX_KNOWN)

    @wraps(decide)
    def run(*arguments):
        # A graph that is being made keeps the answer by itself, and torch.jit.trace what it takes to give it.
        # In a transform (as is_transformed says, by a call more) a tensor looks like another one.
        unseen = _is_compiling() or _is_traced() or _is_in_functorch() or _forward_ad._current_level >= 0
        kind = None if unseen else native.signature(*arguments)
        if kind is None:
            return decide(*arguments)
        chosen = known.get(kind)
        if chosen is None:
            chosen = decide(*arguments)
            known.keep(kind, chosen)
        return chosen

    return run


def _describe(argument) -> str:
    if isinstance(argument, Tensor):
        return f"{tuple(argument.shape)} {argument.dtype} on {argument.device}"
    return repr(argument)


def define(
    schema: str,
    kernels: Mapping[str, Kernel],
    run_torch: Callable,
    fake: Callable,
    tags: Sequence[torch.Tag] = (),
) -> Callable:
    """Declare vlcore::<schema> to torch, opaque to torch.compile, and return what calls it.

    torch.library.custom_op would do the same at about four times the cost of a call. Where nobody watches, the kernel
    is called without torch's dispatcher, which would cost a third as much as a kernel for one row.

    What a forward keeps for its backward may be None in place of a tensor that nobody asks for; torch, to which an
    operator's results are tensors, is given an empty one (see `statistics`).

    Args:
        schema: named <operator>_forward or <operator>_backward, which says what of a kernel computes it; its first
            argument is a tensor and its last the name of the backend.
        kernels: read at each call.
        run_torch: takes the arguments less the backend, and computes it where that is "torch".
        fake: takes the arguments, and only gives the shapes.
        tags: what else torch is to know of it.
    """
    name = schema.split("(")[0]
    direction = name.rpartition("_")[2]

    def run(*arguments):
        first, backend = arguments[0], arguments[-1]
        if backend == TORCH:
            return run_torch(*arguments[:-1])
        compute = getattr(kernels[backend], direction)
        # Kernels are launched on the current device, which need not be the one that holds the tensors.
        if first.is_cuda and first.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device_of(first):
                return compute(*arguments[:-1])
        return compute(*arguments[:-1])

    def run_for_torch(first, *others):
        if autocast.is_on(first):  # what a graph was made for holds no less where it is called under autocast
            with torch.autocast(first.device.type, enabled=False):
                return run_for_torch(first, *others)
        # Nobody has chosen it for these tensors: it stands in a graph, which may have been moved since.
        if others[-1] == CPP and not first.is_cpu:
            raise ValueError(
                f"vlcore::{name} is to run on {CPP!r}, as when its graph was made, and is on {first.device}."
            )
        outputs = run(first, *others)
        if isinstance(outputs, tuple):
            return tuple(statistics(first, (0,), TORCH) if output is None else output for output in outputs)
        return outputs

    _library.define(schema, tags=tags)
    _library.impl(name, run_for_torch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlcore::{name}", fake, lib=_library)
    # Calling torch.ops.vlcore.<name> itself would look for the overload each time, at twice the cost of the call.
    op = getattr(torch.ops.vlcore, name).default

    def call(*arguments):
        return op(*arguments) if _is_watched(arguments) else run(*arguments)

    return call


# Tensors of other types, and sizes that are symbols, have ways of their own through torch's dispatcher.
_is_plain = {Tensor, torch.nn.Parameter, int, float, bool, str, type(None)}.issuperset
# Modes, transforms of functorch, a graph that is traced.
_in_dispatch_mode = torch._C._len_torch_dispatch_stack
_in_function_mode = torch._C._len_torch_function_stack
# Incoming gradients that is_grads_batched=True or a vectorised jacobian hands over at once.
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_in_functorch = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation asks of what is called more than to compute."""
    return _is_in_functorch() or _forward_ad._current_level >= 0


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at: it does not just stand for one in a graph, a mode or a transform."""
    stands_in = _is_compiling() or _in_dispatch_mode() > 0 or _is_in_functorch() or not _is_plain((type(tensor),))
    return not (stands_in or tensor.is_meta or _is_batched(tensor))


def _is_watched(arguments: tuple) -> bool:
    """Whether torch must see a call of an operator; on "meta" it is torch that has nothing to compute."""
    return (
        _is_compiling()
        or _profiler._is_profiler_enabled
        or arguments[0].is_meta
        or _in_dispatch_mode() > 0
        or _in_function_mode() > 0
        or _is_in_functorch()
        or _is_traced()
        or not _is_plain(map(type, arguments))
    )


def written(*tensors: Tensor) -> None:
    """Tell autograd that an operator has written to its arguments, which torch does not see where it is not watching;
    a graph keeps count by itself."""
    if not _is_compiling():
        _increment_version(tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operator on these, which need not have been checked."""
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


class _Forgetful:
    """The context of a forward that no backward follows."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments):
    """function.apply, without what it costs where nothing is to be differentiated."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                if _is_compiling() or _is_in_functorch():
                    return function.apply(*arguments)
                # What torch does behind its preparations for functorch; whoever else watches sees the operators.
                return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
    return function.forward(_Forgetful(), *arguments)


def once_differentiable(backward: Callable, instead: str = 'backend="torch"') -> Callable:
    """A backward that cannot be differentiated in its turn, and raises where that would be needed; `instead` can be.

    torch's decorator of this name raises only where the incoming gradient needs a gradient, and lets a wrong second
    derivative pass where the saved tensors do.
    """

    @wraps(backward)
    def run(ctx, *grads):
        # A graph that is being compiled has no gradient of its gradients, as torch says itself.
        if _is_compiling():
            return backward(ctx, *grads)
        if torch.is_grad_enabled():
            operator = backward.__qualname__.partition(".")[0]
            reason = "can be differentiated once, and create_graph=True asks for more"
            raise RuntimeError(f"{operator} {reason}: {instead} can be again.")
        if autocast.is_on(grads[0]):
            with torch.autocast(grads[0].device.type, enabled=False):
                return run(ctx, *grads)
        # What torch batches it gives to one call after another, where it sees the operators.
        if any(map(_is_batched, grads)):
            with BaseTorchFunctionMode():
                return backward(ctx, *grads)
        return backward(ctx, *grads)

    return run


def statistics(like: Tensor, shape: Sequence, backend: str, keep: bool = True) -> Tensor:
    """An empty float32 tensor for what a forward keeps for its backward; torch recomputes, and keeps nothing."""
    return like.new_empty(shape if keep and backend != TORCH else (0,), dtype=torch.float32)


def gradients(function: Callable, inputs: Sequence[Tensor], *grad_outputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `function` at `inputs`, by running it again under autograd."""
    # An operator that is called within a TorchDispatchMode finds autograd switched off for its thread.
    switched_off = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        switched_off = switched_off.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, switched_off), torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, inputs, grad_outputs, materialize_grads=True)
    return tuple(grad.contiguous() for grad in grads)
