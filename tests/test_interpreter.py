"""What the tests' interpreter makes of bfloat16, beside torch."""

import pytest
import torch
from torch import Tensor

from vlcore.kernels import launch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not launch.INTERPRETED:
    pytest.skip("Triton is not interpreted here", allow_module_level=True)


@triton.jit
def _round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(y_ptr + at, tl.where(a > b, a * b, -a + b))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    at = at[:, None] * SIZE + at[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


def round_to_bfloat16(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, y, BLOCK=x.numel())
    return y


def test_rounds_to_the_nearest():
    # Ties between an even and an odd number, the largest, what overflows, the smallest, and what is no number.
    edges = [1 + 2**-8, 1 + 3 * 2**-8, 3.3895e38, 3.4e38, -3.4e38, 1e-45, 9.2e-41, -0.0, torch.inf, -torch.inf]
    x = torch.cat([torch.tensor([*edges, torch.nan, 0.0]), torch.randn(500) * torch.logspace(-40, 38, 500)])
    torch.testing.assert_close(round_to_bfloat16(x), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16])
def test_rounds_what_is_not_float32(dtype):
    x = torch.randint(-127, 128, (64,)).to(dtype) * 3
    assert torch.equal(round_to_bfloat16(x), x.bfloat16())


def test_adds_multiplies_and_compares():
    a, b = torch.randn(2, 64).bfloat16()
    y = torch.empty_like(a)
    _arithmetic_kernel[(1,)](a, b, y, BLOCK=64)
    assert torch.equal(y, torch.where(a > b, a * b, b - a))


def test_multiplies_matrices():
    a, b = torch.randn(2, 32, 32).bfloat16()
    y = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, y, SIZE=32)
    torch.testing.assert_close(y, a.float() @ b.float())


def test_other_interpreters_are_refused_bfloat16(monkeypatch):
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert launch.dot_refusals(x) == []
    monkeypatch.setattr(launch, "BFLOAT16_INTERPRETED", False)
    assert launch.dot_refusals(x) == ["Triton's interpreter multiplies matrices of bfloat16 wrongly"]
    assert launch.dot_refusals(x.float()) == []


def test_leaves_the_language_as_it_was():
    """A kernel that calls functions of Triton's own; kernels are compiled after it, in other tests."""

    def members():
        return [dict(vars(part)) for part in (tl, tl.core, tl.math, tl.tensor)]

    before, total = members(), torch.empty(1)
    _sum_kernel[(2,)](torch.ones(8), total, BLOCK=8)
    assert members() == before and total == 8
