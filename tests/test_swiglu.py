import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from conftest import DEVICE
from operators import (
    DTYPES,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_strides_do_not_matter,
    assert_well_formed,
    random,
    skip_if_refused,
    values_and_gradients,
)

from vlcore import native, ops
from vlcore.ops.swiglu import KERNELS, SwiGLU, swiglu_reference

BACKENDS = [*KERNELS, "torch"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (), (5, 129), (2, 3, 512), (0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, shape, dtype):
    given = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given)
    assert_matches(lambda gate, up: SwiGLU.apply(gate, up, backend), swiglu_reference, *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    given = random(37, 129, dtype=dtype, scale=9.0), random(37, 129, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given)
    monkeypatch.setattr(native, "level", level)
    assert_matches(lambda *given: ops.swiglu(*given, backend="cpp"), swiglu_reference, *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    # The two halves of one projection, as a fused weight gives them.
    given = random(6, 66).chunk(2, -1)
    skip_if_refused(KERNELS, backend, *given)
    assert_strides_do_not_matter(lambda gate, up: SwiGLU.apply(gate, up, backend), *given)
    assert_strides_do_not_matter(ops.swiglu, *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_the_halves_of_one_product(backend):
    both = random(3, 4, 66)
    skip_if_refused(KERNELS, backend, both, both)
    for gate, up in (both.chunk(2, -1), (both[..., :33], both[..., ::2].mT.contiguous().mT)):
        given = values_and_gradients(lambda gate, up: SwiGLU.apply(gate, up, backend), (gate, up))
        known = values_and_gradients(swiglu_reference, (gate, up))
        for got, wanted in zip(given, known, strict=True):
            torch.testing.assert_close(got, wanted)
        op = torch.ops.vlcore.swiglu_forward.default
        assert op(gate, up, backend).is_contiguous()
        torch.library.opcheck(op, (gate, up, backend))


@pytest.mark.parametrize("level", range(native.level + 1))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_any_size(monkeypatch, backend, dtype, level):
    """Of large negative ones nothing is left, whatever it is multiplied by."""
    monkeypatch.setattr(native, "level", level)
    most = torch.finfo(dtype).max
    gates = torch.tensor([-most, -most / 2, -1e4, -200.0, -89.0, -87.0, -30.0, 0.0, 30.0, 89.0, 1e4], device=DEVICE)
    gate, up = gates.to(dtype).repeat(4), torch.full((44,), 1e3, dtype=dtype, device=DEVICE)
    skip_if_refused(KERNELS, backend, gate, up)

    def outcome(function, *given):
        given = [tensor.clone().requires_grad_() for tensor in given]
        y = function(*given)
        return y, *torch.autograd.grad(y, given, torch.full_like(y, 3.0))

    found = outcome(lambda gate, up: ops.swiglu(gate, up, backend=backend), gate, up)
    low, exact = (
        outcome(lambda gate, up: F.silu(gate) * up, *given) for given in ((gate, up), (gate.double(), up.double()))
    )
    for got, torchs, truth in zip(found, low, exact, strict=True):
        assert_as_accurate(got, torchs, truth)


def test_reference_is_the_formula():
    gate, up = random(5).double(), random(5).double()
    torch.testing.assert_close(swiglu_reference(gate, up), gate / (1 + (-gate).exp()) * up)


def test_reference_gradient():
    assert_gradcheck(swiglu_reference, random(3, 5), random(3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend):
    given = random(4, 16), random(4, 16)
    skip_if_refused(KERNELS, backend, *given)
    assert_well_formed("swiglu_forward", *given, backend)
    assert_well_formed("swiglu_backward", random(4, 16), *given, backend)


def test_compiles_without_graph_breaks():
    given, other = (random(4, 16), random(4, 16)), (random(9, 16), random(9, 16))
    assert_compiles(ops.swiglu, given, other)
    assert_compiles(lambda gate, up: SwiGLU.apply(gate, up, "torch"), given, other)


@pytest.mark.parametrize(
    ("up", "message"),
    [
        (torch.zeros(2, 7), r"up is \(2, 7\); gate \(2, 8\) needs \(2, 8\)"),
        (torch.zeros(8), r"up is \(8,\); gate \(2, 8\) needs \(2, 8\)"),
        (torch.zeros(2, 8).half(), "up is torch.float16 and gate torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(up, message):
    with pytest.raises(ValueError, match=f"swiglu: {message}"):
        ops.swiglu(torch.zeros(2, 8), up)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_large_output(offset):
    """It is written past the caches, but for the end, and where it does not start on a boundary."""
    gate, up = random(2**20 + 8197), random(2**20 + 8197)
    skip_if_refused(KERNELS, "cpp", gate, up)
    y = torch.empty(gate.numel() + offset)[offset:]
    native.run_cpp("swiglu_forward", gate.dtype, gate, up, y, y.numel())
    torch.testing.assert_close(y, swiglu_reference(gate, up))
