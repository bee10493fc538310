from functools import partial

import pytest
import torch
from operators import (
    DTYPES,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_strides_do_not_matter,
    assert_well_formed,
    random,
    skip_if_refused,
)

from vlcore import native, ops
from vlcore.kernels import launch
from vlcore.ops.rms_norm import KERNELS, RMSNorm, rms_norm_reference

BACKENDS = [*KERNELS, "torch"]
# The last is wider than a block of the Triton kernels.
SHAPES = [(1, 1), (5, 129), (2, 3, 2048), (7,), (0, 8), (3, 0, 8), (3, 20001)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, shape, dtype):
    given = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    skip_if_refused(KERNELS, backend, *given)
    # With a small eps, the gradient of a short row is all cancellation, and rounding is all that would be seen.
    eps = 1e-6 if shape[-1] > 16 else 4.0
    assert_matches(
        lambda x, weight: RMSNorm.apply(x, weight, eps, backend), partial(rms_norm_reference, eps=eps), *given
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    given = random(37, 129, dtype=dtype), random(129, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given)
    monkeypatch.setattr(native, "level", level)
    assert_matches(partial(ops.rms_norm, backend="cpp"), rms_norm_reference, *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = random(6, 33), random(33)
    skip_if_refused(KERNELS, backend, *given)
    assert_strides_do_not_matter(lambda x, weight: RMSNorm.apply(x, weight, 1e-6, backend), *given)
    assert_strides_do_not_matter(lambda x, weight: ops.rms_norm(x, weight, backend=backend), *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_the_gradient_over_many_rows(backend):
    given = random(261, 3), random(3)
    skip_if_refused(KERNELS, backend, *given)
    assert_matches(partial(ops.rms_norm, eps=4.0, backend=backend), partial(rms_norm_reference, eps=4.0), *given)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_counts_and_large_values_do_not_overflow(backend, scale):
    given = random(4, 64, scale=scale), random(64)
    skip_if_refused(KERNELS, backend, *given)
    assert_matches(lambda x, weight: ops.rms_norm(x, weight, backend=backend), rms_norm_reference, *given)


def test_reference_gradient():
    assert_gradcheck(rms_norm_reference, random(3, 7), random(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend):
    x, weight = random(4, 16), random(16)
    skip_if_refused(KERNELS, backend, x, weight)
    assert_well_formed("rms_norm_forward", x, weight, 1e-6, backend)
    assert_well_formed("rms_norm_backward", random(4, 16), x, weight, 1e-6, backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_without_graph_breaks(backend):
    given = random(4, 16), random(16)
    if backend != "auto":
        skip_if_refused(KERNELS, backend, *given)
    assert_compiles(lambda x, weight: ops.rms_norm(x, weight, backend=backend) * 2, given, (random(9, 16), given[1]))


def test_the_gradient_does_not_depend_on_the_number_of_threads():
    x, weight = random(500, 192), random(192)
    skip_if_refused(KERNELS, "cpp", x, weight)
    grads = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        wanted = weight.clone().requires_grad_()
        grads += torch.autograd.grad(ops.rms_norm(x, wanted, backend="cpp").square().sum(), wanted)
    torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_says_why_a_backend_cannot_run():
    x = torch.randn(2, 8).half()
    reason = r"cannot run on 'cpp' with \(2, 8\) .*float16 on cpu.* float32 and bfloat16 only"
    with pytest.raises(ValueError, match=reason):
        ops.rms_norm(x, torch.ones(8).half(), backend="cpp")
    with pytest.raises(ValueError, match="cannot run on 'triton' .* too coarse for float64"):
        ops.rms_norm(x.double(), torch.ones(8, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="a row of 65537 is not in 1..65536"):
        ops.rms_norm(torch.zeros(1, 65537), torch.ones(65537), backend="triton")


def test_says_what_this_machine_lacks(monkeypatch):
    x, weight = torch.zeros(2, 8), torch.ones(8)
    monkeypatch.setattr(native, "cpp", None)
    with pytest.raises(ValueError, match=r"cannot run on 'cpp' .* vlcore was built without its C\+\+ extension"):
        ops.rms_norm(x, weight, backend="cpp")
    with pytest.raises(ValueError, match="cannot run on 'cpp' .* it runs on the CPU only"):
        ops.rms_norm(x.to("meta"), weight.to("meta"), backend="cpp")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"Triton needs a GPU, or its interpreter \(TRITON_INTERPRET=1\)"):
        ops.rms_norm(x, weight, backend="triton")
    monkeypatch.setattr(launch, "AVAILABLE", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        ops.rms_norm(x, weight, backend="triton")
    assert torch.equal(ops.rms_norm(x, weight), x)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.ones(7), r"weight is \(7,\); x \(2, 8\) needs \(8,\)"),
        (torch.zeros(()), torch.ones(1), r"weight is \(1,\); x \(\) needs \(\)"),
        (torch.zeros(2, 8), torch.ones(8).half(), "weight is torch.float16 and x torch.float32; they must agree"),
        (torch.zeros(2, 8).long(), torch.ones(8).long(), "x is torch.int64; it needs to be one of .*torch.float32"),
        (torch.zeros(2, 8), torch.ones(8, device="meta"), "weight is on meta and x on cpu"),
    ],
)
def test_refuses_what_does_not_fit(x, weight, message):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(x, weight)
