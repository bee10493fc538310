import dataclasses

import pytest
import torch
from conftest import DEVICE
from operators import (
    DTYPES,
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
from vlcore.ops.quantized_linear import KERNELS, QuantizedLinear, quantized_linear_reference

BACKENDS = [*KERNELS, "torch"]
FORMS = [(8, None), (8, 32), (8, 64), (4, None), (4, 32), (4, 64)]


def through_op(backend, weight):
    return lambda x, bias: QuantizedLinear.apply(x, weight.values, weight.scales, bias, weight.bits, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
@pytest.mark.parametrize("rows", [(2, 3), (), (0,), (19,)])
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_outputs(backend):
    weight = ops.QuantizedWeight(here(torch.zeros(0, 64)).to(torch.int8), here(torch.zeros(0, 1)), 8, None, (0, 64))
    x, bias = random(3, 64).requires_grad_(), random(0).requires_grad_()
    skip_if_refused(KERNELS, backend, x, weight.values, weight.scales, bias, 8)
    ops.quantized_linear(x, weight, bias, backend=backend).sum().backward()
    assert not x.grad.any() and bias.grad.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "group_size"), [(352, 32), (320, 64), (384, 128), (299, None)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 11, 130, 513])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_several_blocks_and_a_part(backend, rows, bits, size, group_size, dtype):
    weight = ops.quantize_weight(random(139, size), bits, group_size)
    x, bias = random(rows, size, dtype=dtype), random(139, dtype=dtype)
    skip_if_refused(KERNELS, backend, x, weight.values, weight.scales, bias, bits)
    assert_matches(through_op(backend, weight), lambda x, bias: quantized_linear_reference(x, weight, bias), x, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "group_size"), [*FORMS, (8, 128), (4, 128)])
@pytest.mark.parametrize("backend", ["cuda"])
def test_a_long_row_for_each_number_of_rows(backend, bits, group_size, dtype):
    """Up to 16 rows: warps take turns at a weight's row, and what they hold of it ahead has to fit."""
    weight, many = ops.quantize_weight(random(35, 2432), bits, group_size), random(16, 2432, dtype=dtype)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16):
        x = many[:rows]
        skip_if_refused(KERNELS, backend, x, weight.values, weight.scales, None, bits)
        assert_matches(through_op(backend, weight), through_op("torch", weight), x, None)
        bad = x.clone()
        bad[rows // 2, 1000] = torch.nan
        y = ops.quantized_linear(bad, weight, backend=backend)
        assert y[rows // 2].isnan().all() and y.isnan().sum() == y.shape[1]


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scales": torch.ones(6, 2).bfloat16()},
            r"scales are \(6, 2\) torch.bfloat16; .* need \(6, 2\) torch.float32",
        ),
        (
            {"scales": torch.ones(6, 2).double()},
            r"scales are \(6, 2\) torch.float64; 8 bits of \(6, 64\) in groups of 32",
        ),
        ({"scales": torch.ones(5, 2)}, r"scales are \(5, 2\) torch.float32; .* need \(6, 2\)"),
        ({"scales": torch.ones(6, 2, device="meta")}, "scales is on meta and values on"),
        ({"values": torch.ones(6, 64)}, r"values are \(6, 64\) torch.float32; .* need \(6, 64\) torch.int8"),
        (
            {"values": torch.ones(6, 32).to(torch.uint8)},
            r"values are \(6, 32\) torch.uint8; .* need \(6, 64\) torch.int8",
        ),
        ({"bits": 4}, r"values are \(6, 64\) torch.int8; 4 bits of .* need \(6, 32\) torch.uint8"),
        ({"bits": 3}, "3 bits are neither 8 nor 4"),
        ({"shape": (6, 2**20)}, r"values are \(6, 64\) torch.int8; 8 bits of \(6, 1048576\)"),
        ({"shape": (600, 64)}, r"values are \(6, 64\) torch.int8; .* need \(600, 64\)"),
        ({"group_size": None}, r"scales are \(6, 2\) torch.float32; .* in groups of 64 need \(6, 1\)"),
        ({"group_size": 48}, "groups of 48 do not divide the 64 inputs of a row"),
        ({"group_size": 0}, "groups of 0 do not divide"),
    ],
)
def test_a_weight_is_what_it_says(changes, message):
    """Kernels go by what it says: of other tensors they would read what is not theirs."""
    weight = ops.quantize_weight(random(6, 64), 8, 32)
    given = {name: here(value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=f"QuantizedWeight: {message}"):
        dataclasses.replace(weight, **given)


def test_a_weight_can_be_made_in_a_graph():
    weight = ops.quantize_weight(random(5, 64), 4, 32)

    def apply(x, bias):
        remade = ops.QuantizedWeight(weight.values, weight.scales, weight.bits, weight.group_size, weight.shape)
        return ops.quantized_linear(x, remade, bias)

    assert_compiles(apply, (random(3, 64), random(5)))


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
    weight = dataclasses.replace(ops.quantize_weight(torch.ones(2, 64), 8, 32), scales=torch.ones(2, 8), group_size=8)
    with pytest.raises(ValueError, match=r"cannot run on 'cpp' .*: 8 groups of 64 inputs are not of one of \(32, 64"):
        ops.quantized_linear(torch.zeros(1, 64), weight, backend="cpp")
    torch.testing.assert_close(ops.quantized_linear(torch.ones(64), weight), torch.full((2,), 64 * 127.0))
    with pytest.raises(ValueError, match="cannot run on 'triton' .* 8 groups of 64 inputs are not of one of"):
        ops.quantized_linear(torch.zeros(1, 64), weight, backend="triton")


def test_says_why_cuda_cannot_run(monkeypatch):
    weight = ops.quantize_weight(torch.ones(2, 72), 8)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot run on 'cuda' .*: .*it runs on a GPU only"):
            ops.quantized_linear(torch.zeros(1, 72), weight, backend="cuda")
    monkeypatch.setattr(native, "cuda_refusals", lambda x: [])
    with pytest.raises(
        ValueError, match="it takes up to 16 rows, and these are 17; 72 inputs of 8 bits are no multiple"
    ):
        ops.quantized_linear(torch.zeros(17, 72), weight, backend="cuda")
    weight = dataclasses.replace(ops.quantize_weight(torch.ones(2, 64), 8, 32), scales=torch.ones(2, 8), group_size=8)
    with pytest.raises(ValueError, match=r"cannot run on 'cuda' .*: 8 groups of 64 inputs are not of one of \(32, 64"):
        ops.quantized_linear(torch.zeros(1, 64), weight, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
@pytest.mark.parametrize(("bits", "group_size"), [*FORMS, (8, 128), (4, 128)])
def test_dequantises_as_the_definition_does(monkeypatch, bits, group_size, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for size in (384, 77):
        weight = ops.quantize_weight(random(7, size), bits, group_size if size % 64 == 0 else None)
        x = torch.eye(size, dtype=dtype, device=DEVICE)
        skip_if_refused(KERNELS, "cpp", x, weight.values, weight.scales, None, bits)
        assert torch.equal(ops.quantized_linear(x, weight, backend="cpp"), weight.dequantize(dtype).t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [*FORMS, (8, 128), (4, 128)])
def test_triton_dequantises_as_the_definition_does(bits, group_size, dtype):
    for outputs, size in ((70, 384), (7, 77)):
        weight = ops.quantize_weight(random(outputs, size), bits, group_size if size % 64 == 0 else None)
        skip_if_refused(KERNELS, "triton", random(1, size, dtype=dtype), weight.values, weight.scales, None, bits)
        from vlcore.kernels import quantized_linear

        made = quantized_linear.dequantize(weight.values, weight.scales, size, bits, dtype)
        assert torch.equal(made, weight.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
@pytest.mark.parametrize(("bits", "group_size"), [*FORMS, (8, 128), (4, 128)])
def test_massive_activations_cost_no_accuracy(monkeypatch, bits, group_size, level, dtype):
    """A few inputs a thousand times as large as the others, as language models have them."""
    monkeypatch.setattr(native, "level", level)
    weight, x = ops.quantize_weight(random(60, 1152), bits, group_size), random(2, 1152)
    x[0, 5], x[0, 700], x[1] = 1000, -3000, x[1] * 1e-4
    x = x.to(dtype)
    skip_if_refused(KERNELS, "cpp", x, weight.values, weight.scales, None, bits)
    for rows in (x, x[:1], x[1:]):
        assert_matches(through_op("cpp", weight), through_op("torch", weight), rows, None)
    # Outputs that the massive inputs do not reach are as accurate as without them.
    quiet = weight.dequantize()
    quiet[:, [5, 700]] = 0
    weight = ops.quantize_weight(quiet, bits, group_size)
    y, exact = ops.quantized_linear(x[:1], weight, backend="cpp"), x[:1].double() @ weight.dequantize().double().t()
    assert (y - exact).abs().max() <= exact.abs().max() * (2**-8 if dtype == torch.bfloat16 else 2**-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_what_is_not_finite_stays_in_its_row(monkeypatch, bits, group_size, level, dtype):
    monkeypatch.setattr(native, "level", level)
    weight = ops.quantize_weight(random(9, 192), bits, group_size)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = random(3, 192, dtype=dtype)
        x[1, 100] = bad
        skip_if_refused(KERNELS, "cpp", x, weight.values, weight.scales, None, bits)
        y = ops.quantized_linear(x, weight, backend="cpp")
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-20, 1e20])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_activations_of_any_size(monkeypatch, level, scale):
    monkeypatch.setattr(native, "level", level)
    weight, x = ops.quantize_weight(random(9, 192), 8), random(2, 192, scale=scale)
    skip_if_refused(KERNELS, "cpp", x, weight.values, weight.scales, None, 8)
    torch.testing.assert_close(
        ops.quantized_linear(x, weight, backend="cpp"), quantized_linear_reference(x, weight), rtol=1e-4, atol=1e-28
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_sums_longer_than_32_bits_hold(bits):
    """A row of the largest products: the integers are summed in stretches that cannot overflow."""
    size = 2**21 + 70
    weight, x = ops.quantize_weight(torch.ones(1, size), bits), torch.ones(1, size)
    skip_if_refused(KERNELS, "cpp", x, weight.values, weight.scales, None, bits)
    torch.testing.assert_close(ops.quantized_linear(x, weight, backend="cpp"), torch.full((1, 1), float(size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_neither_threads_nor_addresses_matter(bits, group_size, dtype):
    weight, x = ops.quantize_weight(random(301, 320), bits, group_size), random(3, 320, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", x, weight.values, weight.scales, None, bits)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.quantized_linear(x, weight, backend="cpp"))
    torch.set_num_threads(threads)
    moved = torch.empty(weight.values.numel() + 1, dtype=weight.values.dtype)[1:].view(weight.values.shape)
    moved.copy_(weight.values)
    x_moved = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    results.append(ops.quantized_linear(x_moved, dataclasses.replace(weight, values=moved), backend="cpp"))
    assert all(torch.equal(results[0], other) for other in results[1:])
