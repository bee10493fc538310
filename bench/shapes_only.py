"""Running an operator for the kernels that it launches, without its arithmetic."""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class ShapesOnly(TorchDispatchMode):
    """Within it, what torch computes in floating point has the right shape, strides and dtype, and is 0. Integers and
    conditions are computed, since launches may depend on them. The launchers of Triton kernels are called, wherever
    the tensors are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vlcore" and args[-1] == "triton":
            operator, _, direction = func._schema.name.removeprefix("vlcore::").rpartition("_")
            with self:
                kernel = import_module(f"vlcore.ops.{operator}").KERNELS["triton"]
                return getattr(kernel, direction)(*args[:-1])
        if func._schema.is_mutable:
            written = _written(func, args, kwargs)
            if all(tensor.is_floating_point() for tensor in written):
                return written[0] if len(written) == 1 else written
        elif not func.is_view and not DEPENDS_ON_VALUES & set(func.tags):
            shapes = func(*_on_meta(args), **_on_meta(kwargs))
            tensors = [leaf for leaf in tree_leaves(shapes) if isinstance(leaf, Tensor)]
            if tensors and all(tensor.is_floating_point() for tensor in tensors):
                return tree_map_only(Tensor, _zeros, shapes)
        return func(*args, **kwargs)


def _written(func, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
    """The tensors that an operator of torch writes to."""
    names = (argument.name for argument in func._schema.arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    wanted = (a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return tuple(tensor for name in wanted for tensor in tree_leaves(given[name]) if tensor is not None)


def _on_meta(arguments: Any) -> Any:
    arguments = tree_map_only(torch.device, lambda device: torch.device("meta"), arguments)
    return tree_map_only(Tensor, lambda tensor: _like(tensor, "meta"), arguments)


def _like(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _zeros(tensor: Tensor) -> Tensor:
    size = _like(tensor, "meta").untyped_storage().nbytes()
    # NumPy asks for zeros, for which the system gives memory only where something is written.
    return torch.from_numpy(np.zeros(size, np.uint8)).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
