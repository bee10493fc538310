import pytest
import torch
from conftest import DEVICE
from operators import (
    DTYPES,
    assert_compiles,
    assert_matches,
    assert_strides_do_not_matter,
    assert_well_formed,
    random,
    skip_if_refused,
)

from vlcore import native, ops
from vlcore.ops.apply_rope import KERNELS, apply_rope_reference


def test_turns_by_differences_of_position():
    x, y, positions = random(2, 5, 3, 16), random(2, 5, 3, 16), torch.arange(5, device=DEVICE).expand(2, 5)
    scores = [
        (ops.apply_rope(x, positions + shift) * ops.apply_rope(y, positions + shift + 2)).sum(-1) for shift in (0, 11)
    ]
    torch.testing.assert_close(*scores)
    assert ops.apply_rope(x.bfloat16(), positions).dtype == torch.bfloat16
    # Position 1 turns the first pair by one radian.
    one = torch.tensor([1.0, 0.0, 0.0, 0.0])[None, None, None]
    wanted = torch.tensor([1.0, 0.0, 1.0, 0.0]) * torch.tensor([1.0, 1.0]).cos()[0]
    wanted[2] = torch.tensor(1.0).sin()
    torch.testing.assert_close(ops.apply_rope(one, torch.ones(1, 1, dtype=torch.int32))[0, 0, 0], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 80), (1, 129, 2, 64), (3, 1, 1, 2), (0, 4, 2, 8), (1, 0, 2, 8)])
@pytest.mark.parametrize("backend", [*KERNELS, "torch"])
def test_matches_the_reference(backend, shape, dtype):
    x, positions = random(*shape, dtype=dtype), torch.arange(shape[1], device=DEVICE).expand(shape[:2])
    skip_if_refused(KERNELS, backend, x, positions, 1e4)
    turn = lambda x: ops.apply_rope(x, positions, backend=backend)  # noqa: E731
    assert_matches(turn, lambda x: apply_rope_reference(x, positions), x)
    assert_strides_do_not_matter(turn, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_at_every_level_of_instructions(monkeypatch, level, dtype):
    # Positions in all quarters of the circle, before zero and far out.
    x, positions = random(1, 800, 2, 34, dtype=dtype), torch.arange(-400, 400, device=DEVICE).mul(41)[None].int()
    skip_if_refused(KERNELS, "cpp", x, positions, 1e4)
    monkeypatch.setattr(native, "level", level)
    turn = lambda x: ops.apply_rope(x, positions, backend="cpp")  # noqa: E731
    assert_matches(turn, lambda x: apply_rope_reference(x, positions), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_turns_by_any_position(dtype):
    x, positions = random(1, 800, 2, 34, dtype=dtype), torch.arange(-400, 400, device=DEVICE).mul(41)[None].int()
    skip_if_refused(KERNELS, "triton", x, positions, 1e4)
    turn = lambda x: ops.apply_rope(x, positions, backend="triton")  # noqa: E731
    assert_matches(turn, lambda x: apply_rope_reference(x, positions), x)


@pytest.mark.parametrize("backend", [*KERNELS, "torch"])
def test_is_a_well_formed_torch_operator(backend):
    x, positions = random(2, 5, 3, 8), torch.arange(5, device=DEVICE).expand(2, 5)
    skip_if_refused(KERNELS, backend, x, positions, 1e4)
    (y,) = assert_well_formed("apply_rope_forward", x, positions, 1e4, backend)
    assert_well_formed("apply_rope_backward", y, positions, 1e4, backend)
    assert_compiles(lambda x: ops.apply_rope(x, positions, backend=backend), (x,))


def test_positions_far_out_stay_exact():
    # In bfloat16, position 16383 would be 16384.
    x = random(1, 2, 1, 64)
    far = torch.tensor([[16382, 16383]], device=DEVICE)
    wanted = ops.apply_rope(x.bfloat16().double(), far)
    torch.testing.assert_close(ops.apply_rope(x.bfloat16(), far).double(), wanted, atol=0.02, rtol=0.01)


def test_refuses_what_does_not_fit():
    x, positions = random(2, 7, 4, 8), torch.arange(7, device=DEVICE).expand(2, 7)
    with pytest.raises(ValueError, match=r"apply_rope: x is \(7, 4, 8\); it needs to be \(B, T, H, D\)"):
        ops.apply_rope(x[0], positions)
    with pytest.raises(ValueError, match=r"apply_rope: positions is \(2, 6\); x \(2, 7, 4, 8\) needs \(2, 7\)"):
        ops.apply_rope(x, positions[:, 1:])
    with pytest.raises(ValueError, match=r"apply_rope: theta is a tensor \(1,\); it needs to be a number"):
        ops.apply_rope(x, positions, torch.tensor([1e6]))
    with pytest.raises(ValueError, match="apply_rope cannot run on 'cpp' .* float32 and bfloat16 only"):
        ops.apply_rope(x.half(), positions, backend="cpp")
    with pytest.raises(ValueError, match="apply_rope cannot run on 'triton' .* too coarse for float64"):
        ops.apply_rope(x.double(), positions, backend="triton")
