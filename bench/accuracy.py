"""When a kernel counts as right."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, baseline: Tensor, exact: Tensor) -> None:
    """`actual` may err from `exact` (float64) twice as far as `baseline`, torch's result in the same dtype, plus one
    unit in the last place: of few numbers, torch's own may all happen to be the nearest."""
    assert actual.dtype == baseline.dtype and actual.shape == baseline.shape == exact.shape
    if not actual.numel():
        return
    assert torch.equal(actual.isfinite(), baseline.isfinite())
    error, baseline_error = ((t.double() - exact).abs().max().item() for t in (actual, baseline))
    last_place = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= 2 * baseline_error + last_place, f"error {error:.3g}; torch's own is {baseline_error:.3g}"
