"""What operators do under torch.autocast: those that multiply matrices do so in its dtype, norms in the widest given.

torch casts what its own operators are given on their way through its dispatcher, which ours need not pass; so each asks
here first, is called again with what is cast, and finds autocast switched off.
"""

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

Output = TypeVar("Output")

_is_on_anywhere = torch._C._is_any_autocast_enabled


def is_on(x: Tensor) -> bool:
    """Whether torch casts for x's kind of device; not for what is no tensor, which the operator's checks name."""
    return _is_on_anywhere() and isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def low(x: Tensor) -> torch.dtype:
    """What torch casts to on x's kind of device."""
    return torch.get_autocast_dtype(x.device.type)


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds what all of these hold; what is no tensor, the operator's checks name."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)))


def run(operator: Callable[..., Output], dtype: torch.dtype, first: Tensor, /, *others, **options) -> Output:
    """The operator on arguments whose floating tensors are brought to a dtype, as torch does all but those of float64;
    gradients go back through the casts. Options stay what they are."""

    def cast(argument):
        is_cast = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(dtype) if is_cast else argument

    with torch.autocast(first.device.type, enabled=False):
        return operator(*map(cast, (first, *others)), **options)
