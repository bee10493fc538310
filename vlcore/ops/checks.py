"""What operators check of their arguments before anything runs; messages are only made when a check fails."""

import torch
from torch import Tensor

from vlcore.ops.dispatch import has_values, needs_gradient

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (torch.int32, torch.int64)


def present(operator: str, name: str, value: object) -> Tensor:
    """A tensor, not None nor a list that could become one."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{operator}: {name} is {kind(value)}; it needs to be a tensor.")
    return value


def kind(value: object) -> str:
    """What an error calls that which is no tensor or number."""
    return "None" if value is None else f"{value!r}" if isinstance(value, str) else f"a {type(value).__name__}"


def rank(operator: str, name: str, tensor: Tensor, dims: str) -> None:
    """`dims` names the dimensions, one word each: "B T H D"."""
    present(operator, name, tensor)
    if tensor.ndim != dims.count(" ") + 1:
        raise ValueError(f"{operator}: {name} is {tuple(tensor.shape)}; it needs to be ({dims.replace(' ', ', ')}).")


def shape(operator: str, name: str, tensor: Tensor, expected: tuple, other_name: str, other: Tensor) -> None:
    """`tensor` must be of the shape that `other` makes `expected`."""
    present(operator, name, tensor)
    if tensor.shape != expected:
        needed = f"{other_name} {tuple(other.shape)} needs {tuple(expected)}"
        raise ValueError(f"{operator}: {name} is {tuple(tensor.shape)}; {needed}.")


def alike(operator: str, **tensors: Tensor | None) -> None:
    """All must be of one floating dtype, on one device; those behind the first may be None."""
    (first_name, first), *others = tensors.items()
    first = present(operator, first_name, first)
    dtype, device = first.dtype, first.device
    if dtype not in FLOATING:
        raise ValueError(f"{operator}: {first_name} is {dtype}; it needs to be one of {FLOATING}.")
    for name, tensor in others:
        if tensor is None:
            continue
        present(operator, name, tensor)
        if tensor.dtype != dtype:
            raise ValueError(f"{operator}: {name} is {tensor.dtype} and {first_name} {dtype}; they must agree.")
        if tensor.device != device:
            on_device(operator, name, tensor, first_name, first)


def on_device(operator: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{operator}: {name} is on {tensor.device} and {other_name} on {other.device}.")


def integer(operator: str, name: str, tensor: Tensor) -> None:
    present(operator, name, tensor)
    if tensor.dtype not in INTEGER:
        raise ValueError(f"{operator}: {name} is {tensor.dtype}; it needs to be one of {INTEGER}.")


def rows(operator: str, name: str, tensor: Tensor) -> None:
    """For what goes over the last dimension."""
    if tensor.ndim == 0:
        raise ValueError(f"{operator}: {name} is (); it needs to be (..., N).")


def number(operator: str, name: str, value: object) -> None:
    """What a tensor holds would have to be waited for, and launches would be planned for one number and made with
    another."""
    if isinstance(value, Tensor):
        raise ValueError(f"{operator}: {name} is a tensor {tuple(value.shape)}; it needs to be a number.")
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"{operator}: {name} is {kind(value)}; it needs to be a number.")


def whole(operator: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ValueError(f"{operator}: {name} is {kind(value)}; it needs to be a whole number.")


def flag(operator: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{operator}: {name} is {kind(value)}; it needs to be True or False.")


def head_dim(operator: str, name: str, tensor: Tensor) -> None:
    """Scores of nothing have no scale."""
    if tensor.shape[-1] == 0:
        raise ValueError(f"{operator}: {name} is {tuple(tensor.shape)}; heads need to hold something.")


def scale(given: float | None, q: Tensor) -> float:
    """Of attention's scores: D^-1/2 of q (..., D) unless given."""
    return q.shape[-1] ** -0.5 if given is None else given


def checked_scale(operator: str, given: float | None, q: Tensor) -> float:
    if given is not None:
        number(operator, "scale", given)
    return scale(given, q)


def may_read(tensor: Tensor) -> bool:
    """Whether its values can be looked at without stopping a GPU or breaking a graph."""
    return tensor.device.type == "cpu" and has_values(tensor)


def heads(operator: str, q: Tensor, k: Tensor) -> None:
    """q (B, T, Hq, D) and k (B, T, Hkv, D): each key head serves a whole number of query heads."""
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{operator}: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads.")


def without_gradient(operator: str, *tensors: Tensor | None) -> None:
    """For an operator that has no gradient: autograd may not be about to record it."""
    if needs_gradient(*tensors):
        raise ValueError(f"{operator} has no gradient, and one is asked for: call it under torch.no_grad().")


def room(operator: str, lengths: Tensor, key_cache: Tensor) -> None:
    """Each row's new token, at lengths (B,), must find a place in the cache (B, S, ...)."""
    if may_read(lengths) and lengths.numel():
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high >= key_cache.shape[1]:
            given = f"lengths from {low} to {high}"
            raise ValueError(f"{operator}: {given} leave no room in a cache of {key_cache.shape[1]} tokens.")
