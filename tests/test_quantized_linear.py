import dataclasses

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
from vlcore.ops.quantized_linear import KERNELS, QuantizedLinear, quantized_linear_reference

BACKENDS = [*KERNELS, "torch"]
FORMS = [(8, None), (8, 32), (4, None), (4, 32), (4, 64)]


def through_op(backend, weight):
    return lambda x, bias: QuantizedLinear.apply(x, weight.values, weight.scales, bias, weight.bits, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
@pytest.mark.parametrize("rows", [(2, 3), (), (0,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, rows, bits, group_size, biased, dtype):
    weight = ops.quantize_weight(random(5, 64), bits, group_size)
    x, bias = random(*rows, 64, dtype=dtype), random(5, dtype=dtype) if biased else None
    skip_if_refused(KERNELS, backend, x, weight.values, weight.scales, bias, bits)
    assert_matches(through_op(backend, weight), lambda x, bias: quantized_linear_reference(x, weight, bias), x, bias)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_shapes(backend, shape, bits):
    weight, x = ops.quantize_weight(random(*shape), bits), random(2, shape[1])
    skip_if_refused(KERNELS, backend, x, weight.values, weight.scales, None, bits)
    assert weight.values.shape == (shape[0], shape[1] if bits == 8 else (shape[1] + 1) // 2)
    assert_matches(through_op(backend, weight), lambda x, bias: quantized_linear_reference(x, weight, bias), x, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_every_level_of_instructions(monkeypatch, bits, group_size, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for rows, size in ((1, 320), (7, 320), (16, 320), (3, 45)):
        groups = group_size if size % 64 == 0 else None
        weight, x = ops.quantize_weight(random(11, size), bits, groups), random(rows, size, dtype=dtype)
        skip_if_refused(KERNELS, "cpp", x, weight.values, weight.scales, None, bits)
        assert_matches(through_op("cpp", weight), through_op("torch", weight), x, None)


@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_rounds_to_the_nearest_step(bits, group_size):
    exact = random(6, 64)
    weight = ops.quantize_weight(exact, bits, group_size)
    groups = exact.unflatten(1, (-1, group_size or 64))
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (weight.dequantize() - exact).unflatten(1, groups.shape[1:]).abs()
    assert (error <= step * 0.5001).all()
    torch.testing.assert_close(weight.scales, step[..., 0])
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16
    # What is on the steps already comes back as it was.
    again = ops.quantize_weight(weight.dequantize(), bits, group_size)
    assert torch.equal(again.values, weight.values)


def test_four_bits_are_packed_two_a_byte():
    weight = ops.quantize_weight(torch.tensor([[7.0, -7.0, 0.0, 1.0, -3.0]]), 4)
    assert weight.values.tolist() == [[15 | 1 << 4, 8 | 9 << 4, 5 | 8 << 4]] and weight.values.dtype == torch.uint8
    assert weight.scales.tolist() == [[1.0]] and weight.shape == (1, 5)
    assert weight.dequantize().tolist() == [[7.0, -7.0, 0.0, 1.0, -3.0]]


def test_zeros_stay_zeros():
    weight = ops.quantize_weight(torch.zeros(2, 64), 8, 32)
    assert not weight.dequantize().any() and not ops.quantized_linear(torch.ones(64), weight).any()


def test_a_weight_cannot_be_changed_and_equals_itself_only():
    weight, other = (ops.quantize_weight(torch.ones(2, 4), 8) for _ in range(2))
    assert weight == weight and weight != other and len({weight, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError, match="bits"):
        weight.bits = 4


@pytest.mark.parametrize(("bits", "group_size"), FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend, bits, group_size):
    weight = ops.quantize_weight(random(64, 5).t(), bits, group_size)
    x, bias = random(3, 64), random(5)
    skip_if_refused(KERNELS, backend, x, weight.values, weight.scales, bias, bits)
    assert_strides_do_not_matter(lambda x, bias: ops.quantized_linear(x, weight, bias, backend=backend), x, bias)


def test_reference_gradient():
    weight = ops.quantize_weight(random(3, 4), 8)
    assert_gradcheck(lambda x, bias: quantized_linear_reference(x, weight, bias), random(2, 4), random(3))


@pytest.mark.parametrize(("bits", "group_size"), FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend, bits, group_size):
    weight, x = ops.quantize_weight(random(5, 64), bits, group_size), random(3, 64)
    skip_if_refused(KERNELS, backend, x, weight.values, weight.scales, None, bits)
    for bias in (None, random(5)):
        assert_well_formed("quantized_linear_forward", x, weight.values, weight.scales, bias, bits, backend)
    assert_well_formed("quantized_linear_backward", random(3, 5), weight.values, weight.scales, 64, bits, backend)


def test_compiles_without_graph_breaks():
    weight, bias = ops.quantize_weight(random(5, 64), 4, 32), random(5)
    given, other = (random(3, 64), bias), (random(7, 64), bias)
    assert_compiles(lambda x, bias: ops.quantized_linear(x, weight, bias), given, other)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 63), None, r"x is \(2, 63\); weight \(5, 64\) needs \(..., 64\)"),
        (torch.zeros(()), None, r"x is \(\); weight \(5, 64\) needs"),
        (torch.zeros(2, 64), torch.zeros(4), r"bias is \(4,\); weight \(5, 64\) needs \(5,\)"),
        (torch.zeros(2, 64), torch.zeros(5).half(), "bias is torch.float16 and x torch.float32"),
        (torch.zeros(2, 64, device="meta"), None, "weight is on cpu and x on meta"),
    ],
)
def test_refuses_what_does_not_fit(x, bias, message):
    with pytest.raises(ValueError, match=f"quantized_linear: {message}"):
        ops.quantized_linear(x, ops.quantize_weight(torch.ones(5, 64), 8), bias)


@pytest.mark.parametrize(
    ("weight", "bits", "group_size", "message"),
    [
        (torch.ones(64), 8, None, r"weight is \(64,\); it needs to be \(N, K\)"),
        (torch.ones(4, 0), 8, None, r"the weight \(4, 0\) has no inputs"),
        (torch.ones(2, 64), 3, None, "3 bits are neither 8 nor 4"),
        (torch.ones(2, 64), 8, 16, r"group_size 16 is not one of \(32, 64, 128\) that divides the input's 64"),
        (torch.ones(2, 64), 8, 128, "group_size 128 is not one of .* that divides the input's 64"),
        (torch.ones(2, 64).long(), 8, None, "weight is torch.int64; it needs to be one of"),
        (torch.full((2, 64), torch.inf), 8, None, r"the weight \(2, 64\) holds values that are not finite"),
    ],
)
def test_quantize_refuses_what_does_not_fit(weight, bits, group_size, message):
    with pytest.raises(ValueError, match=f"quantize_weight: {message}"):
        ops.quantize_weight(weight, bits, group_size)


def test_says_why_a_backend_cannot_run():
    weight = ops.quantize_weight(torch.ones(2, 8), 8)
    with pytest.raises(ValueError, match="quantized_linear cannot run on 'cpp' .*17 rows are more than 16"):
        ops.quantized_linear(torch.zeros(17, 8), weight, backend="cpp")
