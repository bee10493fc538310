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
    launch_with,
    random,
    skip_if_refused,
)

from vlcore import native, ops
from vlcore.ops.layer_norm import KERNELS, LayerNorm, layer_norm_reference

BACKENDS = [*KERNELS, "torch"]


def inputs(*shape, dtype=torch.float32):
    return random(*shape, dtype=dtype), random(shape[-1], dtype=dtype), random(shape[-1], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (2, 3, 4, 256), (0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, shape, dtype):
    given = inputs(*shape, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given)
    # With a small eps, the gradient of a short row is all cancellation, and rounding is all that would be seen.
    eps = 1e-6 if shape[-1] > 16 else 4.0
    assert_matches(lambda *given: LayerNorm.apply(*given, eps, backend), partial(layer_norm_reference, eps=eps), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    given = inputs(37, 129, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given)
    monkeypatch.setattr(native, "level", level)
    assert_matches(lambda *given: ops.layer_norm(*given, backend="cpp"), layer_norm_reference, *given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cols", "block"), [(129, 256), (129, 64)])
def test_tiles_of_rows_and_chunks_of_long_ones(monkeypatch, cols, block, dtype):
    given = inputs(7, cols, dtype=dtype)
    skip_if_refused(KERNELS, "triton", *given)
    launch_with(monkeypatch, BLOCK_ROWS=2, BLOCK_COLS=block, PROGRAMS=2, BLOCK_PARTIALS=1)
    # Behind the last row are zeros, of which nothing but eps makes a number.
    norm, reference = partial(ops.layer_norm, eps=0.0, backend="triton"), partial(layer_norm_reference, eps=0.0)
    assert_matches(norm, reference, *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs(6, 33)
    skip_if_refused(KERNELS, backend, *given)
    assert_strides_do_not_matter(lambda *given: LayerNorm.apply(*given, 1e-6, backend), *given)
    assert_strides_do_not_matter(ops.layer_norm, *given)


def test_reference_is_the_formula():
    x, weight, bias = (tensor.double() for tensor in inputs(4, 6))
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    formula = (x - mean) / (variance + 0.1).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm_reference(x, weight, bias, eps=0.1), formula)


def test_reference_gradient():
    assert_gradcheck(layer_norm_reference, *inputs(3, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend):
    x, weight, bias = inputs(4, 16)
    skip_if_refused(KERNELS, backend, x, weight, bias)
    _, kept = assert_well_formed("layer_norm_forward", x, weight, bias, 1e-6, True, backend)
    assert_well_formed("layer_norm_backward", random(4, 16), x, weight, kept, 1e-6, backend)
    assert not assert_well_formed("layer_norm_forward", x, weight, bias, 1e-6, False, backend)[1].numel()


def test_compiles_without_graph_breaks():
    assert_compiles(ops.layer_norm, inputs(4, 16), inputs(9, 16))
    assert_compiles(lambda *given: LayerNorm.apply(*given, 1e-6, "torch"), inputs(4, 16), inputs(9, 16))


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (1, torch.zeros(7), r"weight is \(7,\); x \(2, 8\) needs \(8,\)"),
        (2, torch.zeros(8, 1), r"bias is \(8, 1\); x \(2, 8\) needs \(8,\)"),
        (2, torch.zeros(8).half(), "bias is torch.float16 and x torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(changed, value, message):
    given = [torch.zeros(2, 8), torch.zeros(8), torch.zeros(8)]
    given[changed] = value
    with pytest.raises(ValueError, match=f"layer_norm: {message}"):
        ops.layer_norm(*given)
