"""When a kernel counts as right."""

from collections.abc import Callable

import torch
from torch import Tensor


def error_of(tensor: Tensor, exact: Tensor) -> float:
    """The largest of a tensor's errors."""
    return (tensor.double() - exact).abs().max().item() if tensor.numel() else 0.0


def assert_as_accurate(
    actual: Tensor, baseline: Tensor, exact: Tensor, elsewhere: Callable[[], float] | None = None
) -> None:
    """`actual` may err from `exact` (float64) twice as far as `baseline`, torch's result in the same dtype, plus one
    unit in the last place: of few numbers, torch's own may all happen to be the nearest. Where that is too little,
    torch's error on other inputs of the kind counts too, if `elsewhere` tells it."""
    assert actual.dtype == baseline.dtype and actual.shape == baseline.shape == exact.shape
    if not actual.numel():
        return
    assert torch.equal(actual.isfinite(), baseline.isfinite())
    error, baseline_error = error_of(actual, exact), error_of(baseline, exact)
    last_place = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if elsewhere is not None and error > 2 * baseline_error + last_place:
        baseline_error = max(baseline_error, elsewhere())
    assert error <= 2 * baseline_error + last_place, f"error {error:.3g}; torch's own is {baseline_error:.3g}"
