from importlib import import_module

import pytest
import torch
from conftest import DEVICE
from operators import (
    DTYPES,
    ON_CPU,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_strides_do_not_matter,
    assert_well_formed,
    here,
    launch_with,
    random,
    skip_if_refused,
)

from vlcore import native, ops
from vlcore.ops.linear_cross_entropy import KERNELS, REDUCTIONS, linear_cross_entropy_reference

BACKENDS = [*KERNELS, "torch"]
# A chunk of "torch" is held in several forms, and its bfloat16 weight's gradient also in float32.
MEMORY = [
    ("cpp", torch.float32, 1 / 20),
    ("cpp", torch.bfloat16, 1 / 20),
    ("triton", torch.float32, 1 / 20),
    ("torch", torch.float32, 1 / 2),
]


def inputs(*shape, width=8, vocabulary=11, ignored=0.4, dtype=torch.float32):
    hidden, weight = random(*shape, width, dtype=dtype), random(vocabulary, width, dtype=dtype)
    labels = torch.randint(0, vocabulary, shape, device=hidden.device)
    return hidden, weight, labels.masked_fill(torch.rand(shape, device=hidden.device) < ignored, -100)


def reduced(reduction, backend="auto"):
    return lambda *given: ops.linear_cross_entropy(*given, reduction=reduction, backend=backend)


def reference(reduction):
    return lambda *given: linear_cross_entropy_reference(*given, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 9), {}),
        ((), {"ignored": 0.0}),
        ((1,), {"width": 1, "vocabulary": 1, "ignored": 0.0}),
        ((300,), {"width": 16, "vocabulary": 130}),
        ((5,), {"width": 0}),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, shape, sizes, reduction, dtype):
    given = inputs(*shape, **sizes, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given)
    assert_matches(reduced(reduction, backend), reference(reduction), *given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_change_nothing(backend, reduction, monkeypatch):
    module, given = import_module("vlcore.ops.linear_cross_entropy"), inputs(37, ignored=0.2)
    skip_if_refused(KERNELS, backend, *given)
    for name, size in {"_CHUNK_ROWS": 4, "_CHUNK_LOGITS": 1, "_BLOCK_WORDS": 3, "_GROUP_ROWS": 5}.items():
        monkeypatch.setattr(module, name, size)
    assert_matches(reduced(reduction, backend), reference(reduction), *given)
    wide = inputs(37, width=64, ignored=0.2)  # as wide as the weight's gradient has room for the logits
    assert_matches(reduced(reduction, backend), reference(reduction), *wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64])  # the weight's gradient has room for the logits of as many rows
def test_tiles_and_blocks_on_triton(monkeypatch, width, dtype):
    given = inputs(23, width=width, vocabulary=50, ignored=0.2, dtype=dtype)
    skip_if_refused(KERNELS, "triton", *given)
    launch_with(monkeypatch, SEGMENT=16, BLOCK_WORDS=8, BLOCK_ROWS=16, BLOCK_SEGMENTS=2)
    monkeypatch.setattr(import_module("vlcore.kernels.linear_cross_entropy"), "SHARE", 1)
    monkeypatch.setattr(import_module("vlcore.kernels.linear_cross_entropy"), "BLOCK_WORDS", 32)
    for reduction in ("sum", "none"):
        assert_matches(reduced(reduction, "triton"), reference(reduction), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    monkeypatch.setattr(import_module("vlcore.ops.linear_cross_entropy"), "_GROUP_ROWS", 40)
    for width in (33, 129):
        given = inputs(63, width=width, vocabulary=1100, ignored=0.0, dtype=dtype)
        skip_if_refused(KERNELS, "cpp", *given)
        assert_matches(reduced("mean", "cpp"), reference("mean"), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_and_long_sums(backend, dtype):
    # Triton's interpreter takes its time.
    vocabulary = 2000 if backend == "triton" else 20000
    hidden, weight, labels = inputs(5, width=4, vocabulary=vocabulary, dtype=dtype)
    skip_if_refused(KERNELS, backend, hidden, weight, labels)
    assert_matches(reduced("sum", backend), reference("sum"), hidden * 40, weight, labels)
    assert_matches(reduced("sum", backend), reference("sum"), hidden / 40, weight, labels)


def test_logits_that_are_not_finite():
    hidden, labels = torch.ones(1, 1), torch.tensor([0])
    for value, expected in ((torch.nan, torch.nan), (torch.inf, torch.nan), (-torch.inf, torch.log(torch.tensor(2.0)))):
        weight = torch.zeros(1500, 1)
        weight[2:1400] = -torch.inf
        weight[1400:] = value
        for backend in BACKENDS:
            skip_if_refused(KERNELS, backend, hidden, weight, labels)
            loss = ops.linear_cross_entropy(hidden, weight, labels, backend=backend)
            torch.testing.assert_close(loss, torch.as_tensor(expected), equal_nan=True)
    weight = torch.cat((torch.full((1100, 1), -torch.inf), torch.zeros(2, 1)))
    loss = ops.linear_cross_entropy(hidden, weight, labels + 1100)
    torch.testing.assert_close(loss, torch.log(torch.tensor(2.0)))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_may_be_run_again(backend, keep):
    hidden, weight, labels = inputs(7)
    skip_if_refused(KERNELS, backend, hidden, weight, labels)
    weight.requires_grad_()
    (once,) = torch.autograd.grad(reference("mean")(hidden, weight, labels) * 3, weight)
    loss = reduced("mean", backend)(hidden, weight, labels) * 3
    for _ in range(2 if keep else 1):
        loss.backward(retain_graph=keep)
    torch.testing.assert_close(weight.grad, once * (2 if keep else 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_supervised_rows(backend):
    hidden, weight, labels = inputs(4, ignored=1.0)
    skip_if_refused(KERNELS, backend, hidden, weight, labels)
    hidden.requires_grad_(), weight.requires_grad_()
    losses = ops.linear_cross_entropy(hidden, weight, labels, reduction="sum", backend=backend)
    for grad in torch.autograd.grad(losses, (hidden, weight)):
        assert not grad.any()
    assert losses == 0
    assert ops.linear_cross_entropy(hidden, weight, labels, backend=backend).isnan()
    empty = ops.linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="none", backend=backend)
    assert empty.shape == (0,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_computes_the_gradients_that_are_needed(backend, frozen, reduction):
    given = inputs(7)
    skip_if_refused(KERNELS, backend, *given)
    wanted = given[1 - frozen].requires_grad_()
    (got,) = torch.autograd.grad(reduced(reduction, backend)(*given).sum(), wanted)
    (known,) = torch.autograd.grad(reference(reduction)(*given).sum(), wanted)
    torch.testing.assert_close(got, known)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("backend", "dtype", "share"), MEMORY)
def test_never_holds_the_logits(backend, dtype, share, needs):
    """What is held at once, beyond inputs and gradients, is a small share of all rows' logits in float32."""
    # Triton's interpreter takes its time.
    rows, width, vocabulary = (128, 32, 6144) if backend == "triton" else (1088, 96, 40000)
    hidden, weight, labels = inputs(rows, width=width, vocabulary=vocabulary, dtype=dtype)
    skip_if_refused(KERNELS, backend, hidden, weight, labels)
    hidden, weight = (tensor.requires_grad_(needed) for tensor, needed in zip((hidden, weight), needs, strict=True))
    if DEVICE == "cuda":  # whose library of products takes its workspace once
        ops.linear_cross_entropy(hidden, weight, labels, backend=backend)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = ops.linear_cross_entropy(hidden, weight, labels, backend=backend)
        if any(needs):
            loss.backward()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    gradients = sum(tensor.numel() * tensor.itemsize for tensor in (hidden, weight) if tensor.requires_grad)
    assert 0 < most < gradients + rows * vocabulary * 4 * share, f"{most:,} bytes, {gradients:,} of them gradients"


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_probabilities_are_not_lost_to_float16(backend):
    """Of a mean over many rows, that a loss scale is to bring back into float16's range."""
    hidden, weight, labels = inputs(1024, width=16, vocabulary=4096, ignored=0.1, dtype=torch.float16)
    hidden *= 0.1
    skip_if_refused(KERNELS, backend, hidden, weight, labels)

    def gradients(loss, *given):
        given = [tensor.detach().requires_grad_() for tensor in given]
        return torch.autograd.grad(loss(*given, labels) * 65536, given)

    truth = gradients(linear_cross_entropy_reference, hidden.double(), weight.double())
    torchs = gradients(linear_cross_entropy_reference, hidden, weight)
    for found, known, exact in zip(gradients(reduced("mean", backend), hidden, weight), torchs, truth, strict=True):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (found, known))
        assert error <= 2 * allowed


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 65536.0), (torch.bfloat16, 1 / 1000)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_scales_the_gradients_in_float32(backend, dtype, scale, reduction):
    """65536 is no float16, and 1/1000 no bfloat16."""
    hidden, weight, labels = inputs(7, dtype=dtype, ignored=0.0)
    skip_if_refused(KERNELS, backend, hidden, weight, labels)
    hidden, weight = hidden / 256, weight / 256
    assert_matches(
        lambda *given: reduced(reduction, backend)(*given) * scale,
        lambda *given: reference(reduction)(*given) * scale,
        *(hidden, weight, labels),
    )


def test_losses_are_wide():
    given = inputs(3, ignored=0.0, dtype=torch.bfloat16)
    assert ops.linear_cross_entropy(*given).dtype == torch.float32
    assert ops.linear_cross_entropy(*given, reduction="none").dtype == torch.float32


def test_another_index_may_be_ignored():
    hidden, weight, labels = inputs(5)
    labels = labels.masked_fill(labels == -100, 3).int()
    loss = ops.linear_cross_entropy(hidden, weight, labels, ignore_index=3)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, labels, ignore_index=3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs(2, 5)
    skip_if_refused(KERNELS, backend, *given)
    assert_strides_do_not_matter(reduced("mean", backend), *given)
    # The shift of a language model: hidden without the last position, labels without the first.
    hidden, weight, labels = given
    shifted = ops.linear_cross_entropy(hidden[:, :-1], weight, labels[:, 1:], backend=backend)
    torch.testing.assert_close(shifted, linear_cross_entropy_reference(hidden[:, :-1], weight, labels[:, 1:]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(reduction):
    # The reference is torch's own cross_entropy; the operator's gradients are ours also on "torch".
    assert_gradcheck(reference(reduction), *inputs(4, width=3, vocabulary=5))
    assert_gradcheck(reduced(reduction, "torch"), *inputs(4, width=3, vocabulary=5))


@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend, needs):
    given = inputs(7)
    skip_if_refused(KERNELS, backend, *given)
    for row_scale in (None, torch.rand(7)):
        assert_well_formed("linear_cross_entropy_forward", *given, row_scale, -100, *needs, backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_graph_breaks(reduction):
    hidden, weight, labels = inputs(2, 5)
    other = random(3, 7, 8), weight, torch.randint(0, 11, (3, 7), device=DEVICE)
    assert_compiles(reduced(reduction), (hidden, weight, labels), other)


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (1, torch.zeros(11, 7), r"weight is \(11, 7\); hidden \(2, 5, 8\) needs \(11, 8\)"),
        (1, torch.zeros(8), r"weight is \(8,\); it needs to be \(V, D\)"),
        (1, torch.zeros(11, 8).half(), "weight is torch.float16 and hidden torch.float32"),
        (2, torch.zeros(2, 4).long(), r"labels is \(2, 4\); hidden \(2, 5, 8\) needs \(2, 5\)"),
        (2, torch.zeros(2, 5), "labels is torch.float32; it needs to be one of .*torch.int64"),
        (2, torch.zeros(2, 5).long().to("meta"), f"labels is on meta and hidden on {DEVICE}"),
        pytest.param(
            2,
            torch.full((2, 5), 11),
            "10 labels, such as 11, are neither in a vocabulary of 11 nor ignore_index -100",
            marks=ON_CPU,
        ),
        pytest.param(2, torch.full((2, 5), -1), "10 labels, such as -1, are neither", marks=ON_CPU),
    ],
)
def test_refuses_what_does_not_fit(changed, value, message):
    given = list(inputs(2, 5))
    given[changed] = here(value)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        ops.linear_cross_entropy(*given)


def test_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match=r"reduction 'max' is none of \('mean', 'sum', 'none'\)"):
        ops.linear_cross_entropy(*inputs(3), reduction="max")
