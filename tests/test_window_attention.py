import pytest
import torch
import torch.nn.functional as F
from operators import (
    DTYPES,
    assert_compiles,
    assert_gradcheck,
    assert_matches,
    assert_strides_do_not_matter,
    assert_well_formed,
    here,
    random,
    shifted,
    skip_if_refused,
    values_and_gradients,
)

from vlcore import native, ops
from vlcore.ops.window_attention import KERNELS, WindowAttention, window_attention_reference

BACKENDS = [*KERNELS, "torch"]


def inputs(batch=2, height=5, width=7, heads=2, dim=8, window=4, bias=True, dtype=torch.float32):
    qkv = random(batch, height, width, 3, heads, dim, dtype=dtype)
    qkv_bias = random(3, heads, dim, dtype=dtype) if bias else None
    return qkv, qkv_bias, random(2 * window - 1, dim, dtype=dtype), random(2 * window - 1, dim, dtype=dtype)


def through_op(backend, window=4):
    return lambda *given: WindowAttention.apply(*given, window, backend)


def reference(window=4):
    return lambda *given: window_attention_reference(*given, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bias": False},
        {"height": 1, "width": 1},
        {"height": 1, "width": 1, "bias": False},
        {"height": 4, "width": 8, "batch": 1},
        {"height": 4, "width": 6, "batch": 1},
        {"height": 4, "width": 6, "batch": 4, "bias": False},
        {"window": 1},
        {"height": 16, "width": 16, "dim": 32, "window": 14, "batch": 1, "heads": 1},
        {"batch": 0},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, dtype):
    given, window = inputs(**sizes, dtype=dtype), sizes.get("window", 4)
    skip_if_refused(KERNELS, backend, *given, window)
    assert_matches(through_op(backend, window), reference(window), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for window, dim in ((7, 33), (5, 80), (14, 64)):
        given = inputs(batch=1, height=16, width=15, dim=dim, window=window, dtype=dtype)
        skip_if_refused(KERNELS, "cpp", *given, window)
        assert_matches(through_op("cpp", window), reference(window), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_what_is_not_finite_stays_in_its_window(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    qkv, bias, *tables = inputs(batch=1, height=15, width=15, heads=1, window=14, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", qkv, bias, *tables, 14)
    qkv[:, :14, :14] = torch.nan
    threads = torch.get_num_threads()
    try:
        # One thread goes on from the first window to those of fewer queries.
        torch.set_num_threads(1)
        out, grad_qkv, *_ = values_and_gradients(through_op("cpp", 14), (qkv, bias, *tables))
    finally:
        torch.set_num_threads(threads)
    for found in (out, grad_qkv):
        assert found[:, :14, :14].isnan().all()
        assert found[:, 14:].isfinite().all() and found[:, :, 14:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_threads_nor_on_addresses(dtype):
    given = inputs(height=17, width=9, dim=32, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, 4)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(values_and_gradients(through_op("cpp"), given))
    torch.set_num_threads(threads)
    results.append(values_and_gradients(through_op("cpp"), tuple(shifted(tensor) for tensor in given)))
    for other in results[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(other, results[0], strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (8, 4), (3, 2)])
def test_equals_attention_on_the_padded_map(size, bias):
    """SAM's own order: pad the map with zeros, project, cut into windows, attend, put together, crop."""
    (height, width), window, heads, dim = size, 4, 2, 8
    x, weight = random(2, height, width, 6).double(), random(3 * heads * dim, 6).double()
    bias = random(3 * heads * dim).double() if bias else None
    tables = random(2 * window - 1, dim).double(), random(2 * window - 1, dim).double()
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    whole = padded.new_zeros(*padded.shape[:3], heads * dim)
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            inside = slice(None), slice(top, top + window), slice(left, left + window)
            qkv = F.linear(padded[inside], weight, bias).view(2, window**2, 3, heads, dim).permute(2, 0, 3, 1, 4)
            out = ops.rel_pos_attention(*qkv, *tables, (window, window))
            whole[inside] = out.transpose(1, 2).reshape(2, window, window, heads * dim)
    qkv = F.linear(x, weight, bias).view(2, height, width, 3, heads, dim)
    at_padding = None if bias is None else bias.view(3, heads, dim)
    torch.testing.assert_close(ops.window_attention(qkv, at_padding, *tables, window), whole[:, :height, :width])


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, 4)
    assert_strides_do_not_matter(through_op(backend), *given)
    assert_strides_do_not_matter(lambda *given: ops.window_attention(*given, 4), *given)


@pytest.mark.parametrize("bias", [True, False])
def test_reference_gradient(bias):
    assert_gradcheck(reference(2), *inputs(batch=1, height=3, width=2, dim=2, window=2, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend, bias):
    given = inputs(height=3, width=5, heads=1, bias=bias)
    skip_if_refused(KERNELS, backend, *given, 4)
    out, lse = assert_well_formed("window_attention_forward", *given, 4, backend)
    assert_well_formed("window_attention_backward", torch.ones_like(out), *given, out, lse, 4, backend)


def test_compiles_without_graph_breaks():
    given = inputs()
    other = (random(4, 5, 7, 3, 2, 8), *given[1:])
    assert_compiles(lambda *given: ops.window_attention(*given, 4), given)
    assert_compiles(through_op("torch"), given, other)


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(2, 35, 3, 2, 8), r"qkv is \(2, 35, 3, 2, 8\); it needs to be \(B, Y, X, 3, H, D\)"),
        (0, torch.zeros(2, 5, 7, 2, 2, 8), r"qkv is \(2, 5, 7, 2, 2, 8\); dimension 3 holds q, k and v"),
        (1, torch.zeros(3, 16), r"qkv_bias is \(3, 16\); qkv .* needs \(3, 2, 8\)"),
        (1, torch.zeros(3, 2, 8).half(), "qkv_bias is torch.float16 and qkv torch.float32"),
        (2, torch.zeros(9, 8), r"rel_pos_h is \(9, 8\); a window of 4 and heads of 8 need \(7, 8\)"),
        (3, torch.zeros(7, 4), r"rel_pos_w is \(7, 4\); a window of 4 and heads of 8 need \(7, 8\)"),
    ],
)
def test_refuses_what_does_not_fit(changed, value, message):
    given = list(inputs())
    given[changed] = here(value)
    with pytest.raises(ValueError, match=f"window_attention: {message}"):
        ops.window_attention(*given, 4)


def test_refuses_a_window_of_nothing():
    with pytest.raises(ValueError, match="a window of 0 holds nothing"):
        ops.window_attention(*inputs(), 0)
