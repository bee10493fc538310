from importlib import import_module

import pytest
import torch
from accuracy import assert_as_accurate
from operators import DTYPES, ON_CPU, assert_well_formed, here, poisoned_memory, random, skip_if_refused, strided

from vlcore import native, ops
from vlcore.models.layers import move_side_by_side
from vlcore.ops.decode_block import KERNELS, _form, decode_block_reference, side_by_side

decode_block = import_module("vlcore.ops.decode_block")
BACKENDS = [*KERNELS, "torch"]
FORMS = [None, (8, None), (8, 32), (4, None), (4, 32)]


def inputs(lengths=(3, 0, 6), capacity=7, heads=4, kv_heads=2, head_dim=16, hidden=96, form=None, dtype=torch.float32):
    size, batch = heads * head_dim, len(lengths)
    shapes = [(size, size), (kv_heads * head_dim, size), (kv_heads * head_dim, size), (size, size)]
    shapes += [(hidden, size), (hidden, size), (size, hidden)]
    projections = [random(*shape, scale=shape[1] ** -0.5) for shape in shapes]
    stored = [ops.quantize_weight(weight, *form) if form else weight.to(dtype) for weight in projections]
    weights = ops.BlockWeights(*(1 + random(2, size, scale=0.1)).to(dtype), *stored)
    x, residual = (random(batch, 1, size, dtype=dtype) for _ in range(2))
    caches = [random(batch, capacity, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    return x, residual, weights, *caches, torch.tensor(lengths, dtype=torch.int64, device=x.device)


def skip(backend, given):
    skip_if_refused(KERNELS, backend, given[0], *given[3:5], [_form(weight) for weight in given[2][2:]])


def copies(given, dtype=None):
    def copy(tensor):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return tensor.clone().to(dtype) if dtype and tensor.is_floating_point() else tensor.clone()

    return tuple(ops.BlockWeights(*map(copy, a)) if isinstance(a, tuple) else copy(a) for a in given)


def assert_right(given, backend="cpp"):
    actual, low, exact = copies(given), copies(given), copies(given, torch.float64)
    with poisoned_memory():
        outputs = ops.decode_block(*actual, backend=backend)
    pairs = zip(outputs, decode_block_reference(*low), decode_block_reference(*exact), strict=True)
    for got, same_dtype, truth in (*pairs, *zip(actual[3:5], low[3:5], exact[3:5], strict=True)):
        assert_as_accurate(got, same_dtype, truth)
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"lengths": (0,), "capacity": 1, "heads": 2, "kv_heads": 1, "hidden": 32},
        {"lengths": ()},
        {"lengths": (300,), "capacity": 301, "heads": 2, "head_dim": 32, "hidden": 160},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, form, dtype):
    given = inputs(**sizes, form=form, dtype=dtype)
    skip(backend, given)
    assert_right(given, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
@pytest.mark.parametrize("form", [None, (8, None), (4, None)])
def test_every_level_of_instructions(monkeypatch, form, level, dtype):
    given = inputs((70, 5), 71, heads=6, kv_heads=3, head_dim=18, hidden=77, form=form, dtype=dtype)
    skip("cpp", given)
    monkeypatch.setattr(native, "level", level)
    assert_right(given)


def move(*weights):
    """To where they are neighbours."""
    parts = ((w.values, w.scales) if isinstance(w, ops.QuantizedWeight) else (w,) for w in weights)
    for tensors in zip(*parts, strict=True):
        move_side_by_side(tensors)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_neighbouring_weights_are_read_by_one_product(monkeypatch, form, rows):
    x, residual, weights, *rest = inputs((3, 0, 6)[:rows], form=form)
    apart, _ = decode_block_reference(*copies((x, residual, weights, *rest)))
    values = [w.dequantize() if form else w.clone() for w in weights[2:]]
    assert side_by_side(weights[2:5]) is None and side_by_side(weights[6:8]) is None
    move(*weights[2:5])
    move(*weights[6:8])
    whole = side_by_side(weights[2:5])
    assert whole.shape == (sum(w.shape[0] for w in weights[2:5]), x.shape[2])
    assert torch.equal(whole.dequantize() if form else whole, torch.cat(values[:3]))
    assert all(torch.equal(w.dequantize() if form else w, v) for w, v in zip(weights[2:], values, strict=True))
    products = []
    for name in ("linear", "quantized_linear"):
        function = getattr(decode_block, name)
        seen = lambda x, weight, function=function, **more: products.append(weight) or function(x, weight, **more)  # noqa: E731
        monkeypatch.setattr(decode_block, name, seen)
    together, _ = decode_block_reference(x, residual, weights, *rest)
    assert len(products) == (4 if rows == 1 else 6)
    torch.testing.assert_close(together, apart)


def test_only_neighbours_alike_are_one():
    whole = torch.randn(9, 4)
    for others in (
        [whole[:3], whole[4:]],
        [whole[3:], whole[:3]],
        [whole[:3], whole[3:, :2]],
        [whole[:3], whole[3:].double()],
        [whole[:3], torch.randn(6, 4)],
        [whole[::2], whole[1::2]],
    ):
        assert side_by_side(others) is None
    for alike in ([whole[:3], whole[3:]], [whole[2:5], whole[5:6], whole[6:7]]):
        assert torch.equal(side_by_side(alike), torch.cat(alike))
    before = whole[:3].data_ptr()
    for others in ([whole[:3], whole[4:].double()], [whole[:3], whole[4:, :2]], [whole[:3], whole[3:]]):
        move_side_by_side(others)
        assert others[0].data_ptr() == before


@pytest.mark.parametrize("form", FORMS)
def test_begins_a_stream(form):
    x, _, *rest = inputs(form=form)
    skip("cpp", (x, None, *rest))
    assert_right((x, None, *rest))
    for got, wanted in zip(
        ops.decode_block(x, None, *rest), ops.decode_block(x, torch.zeros_like(x), *rest), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_one_row_of_each_cache_and_nothing_else(backend):
    given = inputs()
    skip(backend, given)
    before = copies(given)
    ops.decode_block(*given, backend=backend)
    for row, length in enumerate(given[5].tolist()):
        for cache, old in zip(given[3:5], before[3:5], strict=True):
            assert not torch.equal(cache[row, length], old[row, length])
            old[row, length] = cache[row, length]
    for tensor, old in zip((*given[:2], *given[2], *given[3:]), (*before[:2], *before[2], *before[3:]), strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_learns_that_the_caches_were_written_to(backend):
    given = inputs()
    skip(backend, given)
    caches = [cache.requires_grad_() * 1 for cache in given[3:5]]
    given = (*given[:3], *caches, given[5])
    for cache in caches:
        loss = cache.square().sum()
        with torch.no_grad():
            ops.decode_block(*given, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():  # whose tensors have no version
        ops.decode_block(*copies(given), backend=backend)


@pytest.mark.parametrize("form", [None, (8, 32), (4, None)])
def test_results_depend_neither_on_threads_nor_on_the_other_rows(form):
    given = inputs((130, 40), 131, form=form, dtype=torch.bfloat16)
    skip("cpp", given)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.decode_block(*copies(given), backend="cpp"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip(backend, given)
    spread = ops.BlockWeights(*map(strided, given[2]))
    caches = [random(7, 3, 2, 16).transpose(0, 1).copy_(cache) for cache in given[3:5]]
    actual = ops.decode_block(strided(given[0]), strided(given[1]), spread, *caches, given[5], backend=backend)
    for got, wanted in zip((*actual, caches[0]), (*ops.decode_block(*given, backend=backend), given[3]), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("form", [None, (4, 32)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend, form):
    x, residual, weights, *rest = given = inputs(form=form)
    skip(backend, given)
    tensors = [w.values if isinstance(w, ops.QuantizedWeight) else w for w in weights]
    scales = [w.scales for w in weights if isinstance(w, ops.QuantizedWeight)]
    bits = [form[0] if form else 0] * 7
    for stream in (residual, None):
        assert_well_formed("decode_block_forward", x, stream, tensors, scales, bits, *rest, 1e4, 1e-6, backend)


def test_compiles_without_graph_breaks():
    def two_blocks(x, residual, weights, key_cache, value_cache, lengths):
        x, residual = ops.decode_block(x, residual, weights, key_cache, value_cache, lengths)
        return ops.decode_block(x, residual, weights, key_cache, value_cache, lengths + 1)

    torch._dynamo.reset()
    compiled = torch.compile(two_blocks, fullgraph=True, backend="aot_eager")
    for form in (None, (8, 32)):
        given = inputs(lengths=(3, 0, 5), form=form)
        other = copies(given)
        torch.testing.assert_close(compiled(*given), two_blocks(*other))
        torch.testing.assert_close(given[3], other[3])


def changed(index, value):
    given = list(inputs())
    given[index] = here(value)
    return given


def reweighted(**weights):
    given = list(inputs())
    given[2] = given[2]._replace(**{name: here(weight) for name, weight in weights.items()})
    return given


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(0, torch.zeros(3, 2, 64)), r"x is \(3, 2, 64\); it takes one token a row"),
        (lambda: changed(0, torch.zeros(3, 64)), r"x is \(3, 64\); it needs to be \(B, 1, D\)"),
        (lambda: changed(1, torch.zeros(3, 1, 63)), r"residual is \(3, 1, 63\); x .* needs \(3, 1, 64\)"),
        (lambda: changed(3, torch.zeros(2, 7, 2, 16)), r"key_cache is \(2, 7, 2, 16\); x .* needs \(3, 7, 2, 16\)"),
        (lambda: changed(4, torch.zeros(3, 6, 2, 16)), r"value_cache is \(3, 6, 2, 16\); key_cache .* needs"),
        pytest.param(
            lambda: changed(5, torch.tensor([0, 7, 1])),
            "lengths from 0 to 7 leave no room in a cache of 7 tokens",
            marks=ON_CPU,
        ),
        (lambda: changed(5, torch.zeros(3)), "lengths is torch.float32; it needs to be one of"),
        (lambda: reweighted(q=torch.zeros(50, 64)), "q gives 50 outputs, no multiple of the cache's 32 a token"),
        (lambda: reweighted(down=torch.zeros(64, 95)), r"the weight down is \(64, 95\); x .* need \(64, 96\)"),
        (lambda: reweighted(o=torch.zeros(64, 64).half()), "o is torch.float16 and x torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=f"decode_block: {message}"):
        ops.decode_block(*make())


def test_refuses_odd_heads():
    with pytest.raises(ValueError, match="a head of 7 is odd"):
        ops.decode_block(*inputs(head_dim=7, heads=4))


def test_says_why_a_backend_cannot_run():
    with pytest.raises(ValueError, match="decode_block cannot run on 'cpp' .*17 rows are more than 16"):
        ops.decode_block(*inputs((0,) * 17), backend="cpp")
    given = reweighted(k=ops.quantize_weight(random(32, 64), 8))
    with pytest.raises(ValueError, match="q, k and v, and gate and up, must be quantised alike"):
        ops.decode_block(*given, backend="cpp")
    assert_right(given, "auto")


def test_has_no_gradient():
    x, *rest = inputs()
    with pytest.raises(ValueError, match=r"no gradient, and one is asked for: call it under torch.no_grad\(\)"):
        ops.decode_block(x.requires_grad_(), *rest)
    with torch.no_grad():
        ops.decode_block(x, *rest)
