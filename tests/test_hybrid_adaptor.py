import pytest
import torch
from operators import (
    DTYPES,
    amid_nan,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_strides_do_not_matter,
    assert_well_formed,
    here,
    random,
    skip_if_refused,
)

from vlcore import native, ops
from vlcore.ops.hybrid_adaptor import KERNELS, HybridAdaptor, hybrid_adaptor_reference

BACKENDS = [*KERNELS, "torch"]
NAMES = ("high", "low", "high_weight", "high_bias", "low_weight", "low_bias", "out_weight", "out_bias")


def inputs(*rows, widths=(6, 5), projected=(4, 3), out=8, dtype=torch.float32):
    high, low = (random(*(rows or (2, 3)), width, dtype=dtype) for width in widths)
    layers = [(projected[0], widths[0]), (projected[1], widths[1]), (out, sum(projected))]
    return high, low, *(random(*shape, dtype=dtype) for n, k in layers for shape in ((n, k), (n,)))


def through_op(backend):
    return lambda *given: HybridAdaptor.apply(*given, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rows": (1,), "widths": (1, 1), "projected": (1, 1), "out": 1},
        {"rows": ()},
        {"rows": (33,), "widths": (64, 48), "projected": (96, 96), "out": 130},
        {"rows": (0, 3)},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, given, dtype):
    given = inputs(*given.get("rows", ()), **{k: v for k, v in given.items() if k != "rows"}, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given)
    assert_matches(through_op(backend), hybrid_adaptor_reference, *given)


@pytest.mark.parametrize("backend", KERNELS)
def test_tiles_of_more_rows_than_one_group_and_nothing_beyond_the_tensors(backend):
    given = inputs(1100, widths=(3, 34), projected=(70, 66), out=3)
    skip_if_refused(KERNELS, backend, *given)
    assert_matches(through_op(backend), hybrid_adaptor_reference, *(amid_nan(tensor) for tensor in given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for rows in (1, 70):
        given = inputs(rows, widths=(65, 34), projected=(35, 66), out=77, dtype=dtype)
        skip_if_refused(KERNELS, "cpp", *given)
        assert_matches(through_op("cpp"), hybrid_adaptor_reference, *given)


def test_reference_is_the_formula():
    high, low, high_weight, high_bias, low_weight, low_bias, out_weight, out_bias = (t.double() for t in inputs())
    joined = torch.cat((high @ high_weight.T + high_bias, low @ low_weight.T + low_bias), -1)
    activated = joined * 0.5 * (1 + torch.erf(joined / 2**0.5))
    given = (high, low, high_weight, high_bias, low_weight, low_bias, out_weight, out_bias)
    torch.testing.assert_close(ops.hybrid_adaptor(*given), activated @ out_weight.T + out_bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given)
    assert_strides_do_not_matter(through_op(backend), *given)
    assert_strides_do_not_matter(ops.hybrid_adaptor, *given)


def test_reference_gradient():
    assert_gradcheck(hybrid_adaptor_reference, *inputs(2, widths=(2, 3), projected=(2, 1), out=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given)
    out, hidden = assert_well_formed("hybrid_adaptor_forward", *given, backend)
    kept = (given[0], given[1], given[2], given[4], given[6], hidden)
    assert_well_formed("hybrid_adaptor_backward", torch.ones_like(out), *kept, backend)


def test_compiles_without_graph_breaks():
    given = inputs(4)
    other = (random(9, 6), random(9, 5), *given[2:])
    assert_compiles(ops.hybrid_adaptor, given, other)
    assert_compiles(through_op("torch"), given, other)


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("low", torch.zeros(2, 4, 5), r"low is \(2, 4, 5\); high \(2, 3, 6\) needs \(2, 3, 5\)"),
        ("high_weight", torch.zeros(4, 5), r"high_weight is \(4, 5\); high \(2, 3, 6\) needs \(4, 6\)"),
        ("low_weight", torch.zeros(3), r"low_weight is \(3,\); it needs to be \(out, in\)"),
        ("out_weight", torch.zeros(8, 8), r"out_weight is \(8, 8\); the two projections are 7 wide together"),
        ("high_bias", torch.zeros(3), r"high_bias is \(3,\); high_weight \(4, 6\) needs \(4,\)"),
        ("out_bias", torch.zeros(7), r"out_bias is \(7,\); out_weight \(8, 7\) needs \(8,\)"),
        ("low_bias", torch.zeros(3).half(), "low_bias is torch.float16 and high torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(changed, value, message):
    given = dict(zip(NAMES, inputs(), strict=True))
    with pytest.raises(ValueError, match=f"hybrid_adaptor: {message}"):
        ops.hybrid_adaptor(**{**given, changed: here(value)})
