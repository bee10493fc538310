from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
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
from vlcore.ops.linear import KERNELS, LinearFunction, linear_backward, linear_reference

BACKENDS = [*KERNELS, "torch"]


def inputs(rows=(3,), outputs=7, size=33, bias=True, dtype=torch.float32):
    weight = random(outputs, size, dtype=dtype)
    return random(*rows, size, dtype=dtype), weight, random(outputs, dtype=dtype) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rows": (1,), "outputs": 1, "size": 1},
        {"rows": (1, 1), "outputs": 130, "size": 2048, "bias": False},
        {"rows": (2, 5), "outputs": 9, "size": 64},
        {"rows": (16,), "outputs": 12, "size": 129},
        {"rows": (17,), "outputs": 1, "size": 1},
        {"rows": (63,), "outputs": 129, "size": 65},
        {"rows": (2, 65), "outputs": 64, "size": 0},
        {"rows": (2, 389), "outputs": 300, "size": 34, "bias": False},
        {"rows": (700,), "outputs": 451, "size": 1503},
        {"rows": ()},
        {"rows": (0,)},
        {"outputs": 0},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, dtype):
    given = inputs(**sizes, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given)
    assert_matches(lambda *given: LinearFunction.apply(*given, backend), linear_reference, *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for rows in (1, 2, 3, 4, 13, 130):
        given = inputs(rows=(rows,), outputs=11, size=77, dtype=dtype)
        skip_if_refused(KERNELS, "cpp", *given)
        assert_matches(partial(ops.linear, backend="cpp"), linear_reference, *given)


@pytest.mark.parametrize("level", range(native.level + 1))
def test_many_rows_what_is_not_finite_stays_in_its_row_and_output(monkeypatch, level):
    monkeypatch.setattr(native, "level", level)
    x, weight, _ = inputs(rows=(333,), outputs=301, size=65, dtype=torch.bfloat16)
    skip_if_refused(KERNELS, "cpp", x, weight, None)
    x[332, 64], x[5, 0], weight[300, 64], weight[7, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    with torch.no_grad():
        y = ops.linear(x, weight, backend="cpp")
    finite = torch.ones(333, 301, dtype=torch.bool)
    finite[[332, 5]] = False
    finite[:, [300, 7]] = False
    assert torch.equal(y.isfinite(), finite)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given)
    assert_strides_do_not_matter(lambda *given: LinearFunction.apply(*given, backend), *given)
    assert_strides_do_not_matter(ops.linear, *given)


def test_reference_gradient():
    assert_gradcheck(linear_reference, *inputs(size=4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given)
    (y,) = assert_well_formed("linear_forward", *given, None, None, backend)
    assert_well_formed("linear_forward", *given, torch.ones_like(y), "gelu", backend)
    for needs in ((True, True), (True, False), (False, True)):
        assert_well_formed("linear_backward", torch.ones_like(y), *given[:2], *needs, backend)


def test_compiles_without_graph_breaks():
    assert_compiles(ops.linear, inputs(), inputs(rows=(40,)))
    assert_compiles(lambda *given: LinearFunction.apply(*given, "torch"), inputs(), inputs(rows=(5,)))


def test_few_rows_without_gradients_go_to_the_kernel_that_reads_fastest(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "run_cpp", lambda kernel, *rest: calls.append(kernel))
    x, weight, bias = inputs()
    skip_if_refused(KERNELS, "cpp", x, weight, bias)
    with torch.no_grad():
        ops.linear(x, weight, bias)
    ops.linear(x, weight.requires_grad_(), bias)
    assert calls == ["linear_forward"]


@pytest.mark.parametrize(
    ("level", "dtype", "rows", "outputs", "size", "takes_ours"),
    [
        (2, torch.bfloat16, 512, 512, 512, False),
        (3, torch.bfloat16, 17, 8, 8, True),
        (3, torch.float32, 17, 8, 8, True),
        (4, torch.bfloat16, 256, 128, 384, True),
        (4, torch.bfloat16, 255, 128, 384, False),
        (4, torch.bfloat16, 256, 127, 384, False),
        (4, torch.bfloat16, 256, 128, 383, False),
        (4, torch.float32, 256, 128, 384, False),
    ],
)
def test_many_rows_go_to_the_kernel_where_it_is_faster(monkeypatch, level, dtype, rows, outputs, size, takes_ours):
    calls = []
    monkeypatch.setattr(native, "level", level)
    monkeypatch.setattr(native, "run_cpp", lambda kernel, *rest: calls.append(kernel))
    given = inputs(rows=(rows,), outputs=outputs, size=size, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given)
    with torch.no_grad():
        ops.linear(*given)
    assert calls == ["linear_blocked_forward"] * takes_ours


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4), None, r"weight is \(4,\); it needs to be \(N, K\)"),
        (torch.zeros(2, 3), torch.zeros(4, 2), None, r"weight is \(4, 2\); x \(2, 3\) needs \(4, 3\)"),
        (torch.zeros(()), torch.zeros(4, 2), None, r"weight is \(4, 2\); x \(\) needs \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), r"bias is \(3,\); weight \(4, 3\) needs \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(4, 3).half(), None, "weight is torch.float16 and x torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(x, weight, bias, message):
    with pytest.raises(ValueError, match=f"linear: {message}"):
        ops.linear(x, weight, bias)


def test_refuses_an_activation_that_it_does_not_have_and_a_residual_of_another_shape():
    x, weight, _ = inputs()
    with pytest.raises(ValueError, match="linear: activation 'relu' is neither 'gelu' nor None"):
        ops.linear(x, weight, activation="relu")
    with pytest.raises(ValueError, match=r"linear: residual is \(3, 8\); x \(3, 33\) needs \(3, 7\)"):
        ops.linear(x, weight, residual=random(3, 8))


def test_says_why_a_backend_cannot_run():
    with pytest.raises(ValueError, match="linear cannot run on 'cpp' .*it computes in float32 and bfloat16 only"):
        ops.linear(torch.zeros(17, 3).half(), torch.zeros(4, 3).half(), backend="cpp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 97])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_follows_the_product(backend, rows, dtype):
    given = inputs(rows=(rows,), outputs=66, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given)
    given = (*given, random(rows, 66, dtype=dtype))
    for activation in ("gelu", None):

        def fused(x, weight, bias, residual, activation=activation):
            return ops.linear(x, weight, bias, residual=residual, activation=activation, backend=backend)

        def reference(*given, activation=activation):
            return linear_reference(*given, activation)

        assert_matches(fused, reference, *given)
        assert_strides_do_not_matter(fused, *given)
        assert_compiles(fused, given)
        with torch.no_grad():
            exact = reference(*(tensor.double() for tensor in given))
            assert_as_accurate(fused(*given), reference(*given), exact)


@pytest.mark.parametrize("level", range(native.level + 1))
def test_gelu_at_the_ends_of_its_range(monkeypatch, level):
    monkeypatch.setattr(native, "level", level)
    x, ends = torch.linspace(-15, 15, 4001)[:, None], torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 1e30])[:, None]
    one = torch.ones(1, 1)
    skip_if_refused(KERNELS, "cpp", x, one, None)

    def gelu(x):
        with torch.no_grad():
            return ops.linear(x, one, activation="gelu", backend="cpp")

    assert_as_accurate(gelu(x), F.gelu(x), F.gelu(x.double()))
    assert torch.equal(gelu(ends.repeat(4, 1)), ends.relu().repeat(4, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_neither_threads_nor_addresses_matter(dtype):
    given = inputs(rows=(401,), outputs=301, size=334, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given)

    def run(x, weight, bias):
        with torch.no_grad():
            y = ops.linear(x, weight, bias, activation="gelu", backend="cpp")
            return (y, *linear_backward(y, x, weight, True, True, "cpp"))

    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(*given))
    torch.set_num_threads(threads)
    results.append(run(*(torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in given)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(20, 8, 16384), (20, 16384, 8), (16384, 8, 20)])
def test_long_sums_of_many_rows_keep_their_accuracy(sizes, dtype):
    """One of them over the inputs, the outputs and the rows."""
    rows, outputs, size = sizes
    given = inputs(rows=(rows,), outputs=outputs, size=size, dtype=dtype, bias=False)
    skip_if_refused(KERNELS, "cpp", *given)
    assert_matches(partial(ops.linear, backend="cpp"), linear_reference, *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_addresses_matter(dtype):
    x, weight, bias = inputs(rows=(7,), outputs=301, size=333, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", x, weight, bias)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.linear(x, weight, bias, backend="cpp"))
    torch.set_num_threads(threads)
    moved = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in (x, weight, bias)]
    results.append(ops.linear(*moved, backend="cpp"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums_keep_their_accuracy(dtype):
    given = inputs(rows=(2,), outputs=8, size=65536, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given)
    assert_matches(partial(ops.linear, backend="cpp"), linear_reference, *given)
