import pytest
import torch
from accuracy import assert_as_accurate
from conftest import DEVICE
from operators import DTYPES, ON_CPU, assert_well_formed, here, poisoned_memory, random, skip_if_refused

from vlcore import native, ops
from vlcore.ops.decode_attention import KERNELS, decode_attention_reference

BACKENDS = [*KERNELS, "torch"]


def inputs(lengths=(3, 0, 6), size=7, heads=4, key_heads=2, dim=8, dtype=torch.float32):
    batch = len(lengths)
    q = random(batch, 1, heads, dim, dtype=dtype)
    k, v = (random(batch, 1, key_heads, dim, dtype=dtype) for _ in range(2))
    caches = [random(batch, size, key_heads, dim, dtype=dtype) for _ in range(2)]
    return q, k, v, *caches, torch.tensor(lengths, dtype=torch.int64, device=q.device)


def copies(given, dtype=None):
    return tuple(t.clone().to(dtype) if dtype and t.is_floating_point() else t.clone() for t in given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"lengths": (0,), "size": 1, "heads": 1, "key_heads": 1, "dim": 2},
        {"lengths": (4, 4)},
        {"lengths": ()},
        {"lengths": (700, 33), "size": 800, "dim": 64},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, dtype):
    given = inputs(**sizes, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given, 1e4, 0.5)
    actual, low, exact = copies(given), copies(given), copies(given, torch.float64)
    with poisoned_memory():
        out = ops.decode_attention(*actual, scale=0.5, backend=backend)
    assert_as_accurate(out, decode_attention_reference(*low, scale=0.5), decode_attention_reference(*exact, scale=0.5))
    for got, same_dtype, truth in zip(actual[3:5], low[3:5], exact[3:5], strict=True):
        assert_as_accurate(got, same_dtype, truth)
    assert torch.equal(actual[5], given[5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotates_as_prompts_are_rotated(backend):
    """Far from the start, where the roundings of an angle are many times those of a key."""
    length = 8191
    q, k, v, *caches, lengths = inputs(lengths=(length,), size=length + 1, heads=1, key_heads=1, dim=64)
    skip_if_refused(KERNELS, backend, q, k, v, *caches, lengths, 1e4, 0.5)
    for cache in caches:
        cache.zero_()
    out = ops.decode_attention(q, k, v, *caches, lengths, backend=backend)
    query, key = (ops.apply_rope(x, lengths[:, None], backend="torch") for x in (q, k))
    torch.testing.assert_close(caches[0][:, -1:], key, rtol=1e-6, atol=1e-6)
    # All other keys and values are 0.
    weight = (query * key).sum().mul(64**-0.5).exp()
    torch.testing.assert_close(out, v * weight / (weight + length), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (12, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("backend", ["cuda"])
def test_heads_that_share_keys(backend, heads, key_heads, dim, dtype):
    """Rows from empty to longer than all that the blocks of a row read at once; the tokens past them are NaN."""
    given = inputs(lengths=(0, 1, 9, 1100), size=1104, heads=heads, key_heads=key_heads, dim=dim, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given, 1e4, 0.5)
    for row, length in enumerate(given[5].tolist()):
        given[3][row, length:], given[4][row, length:] = torch.nan, torch.nan
    for lengths in (given[5], given[5].int()):
        actual, low, exact = copies(given), copies(given), copies(given, torch.float64)
        with poisoned_memory():
            out = ops.decode_attention(*actual[:5], lengths, backend=backend)
        references = [row_by_row(some) for some in (low, exact)]
        assert_as_accurate(out, *references)


def row_by_row(given):
    """The reference where tokens past a row's own are NaN, which a mask would not keep out of its sums."""
    rows = [[tensor[row : row + 1] for tensor in given] for row in range(len(given[5]))]
    return torch.cat(
        [decode_attention_reference(*row[:3], *(c[:, : int(row[5]) + 1] for c in row[3:5]), row[5]) for row in rows]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    given = inputs(lengths=(530, 70), size=600, heads=6, dim=18, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, 1e4, 0.5)
    monkeypatch.setattr(native, "level", level)
    low, exact = copies(given), copies(given, torch.float64)
    out = ops.decode_attention(*given, backend="cpp")
    assert_as_accurate(out, decode_attention_reference(*low), decode_attention_reference(*exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "length"), [("cpp", 4096), ("triton", 1060)])
def test_long_caches_keep_their_accuracy(backend, length, dtype):
    given = inputs(lengths=(length,), size=length + 9, heads=2, key_heads=1, dim=32, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given, 1e4, 0.5)
    low, exact = copies(given), copies(given, torch.float64)
    out = ops.decode_attention(*given, backend=backend)
    assert_as_accurate(out, decode_attention_reference(*low), decode_attention_reference(*exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_other_rows_nor_addresses_matter(dtype):
    given = inputs(lengths=(300, 90), size=301, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, 1e4, 0.5)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.decode_attention(*copies(given), backend="cpp"))
    torch.set_num_threads(threads)
    moved = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t) for t in given[:5]]
    results.append(ops.decode_attention(*moved, given[5], backend="cpp"))
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = ops.decode_attention(*(t[1:] for t in copies(given)), backend="cpp")
    assert torch.equal(alone, results[0][1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_behind_a_row_s_tokens_is_not_read(backend):
    *given, key_cache, value_cache, lengths = inputs()
    skip_if_refused(KERNELS, backend, *given, key_cache, value_cache, lengths, 1e4, 0.5)
    wanted = ops.decode_attention(*given, key_cache.clone(), value_cache.clone(), lengths, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        key_cache[row, length + 1 :], value_cache[row, length + 1 :] = torch.nan, torch.inf
    assert torch.equal(ops.decode_attention(*given, key_cache, value_cache, lengths, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_of_steps_is_causal_attention(backend):
    q, k, v = random(2, 6, 4, 8), random(2, 6, 2, 8), random(2, 6, 2, 8)
    caches = torch.full((2, 2, 6, 2, 8), torch.nan, device=DEVICE)
    skip_if_refused(KERNELS, backend, q[:, :1], k[:, :1], v[:, :1], *caches, torch.zeros(2), 1e4, 0.5)
    steps = [
        ops.decode_attention(
            *(x[:, t : t + 1] for x in (q, k, v)),
            *caches,
            torch.full((2,), t, dtype=torch.int32, device=DEVICE),
            backend=backend,
        )
        for t in range(6)
    ]
    whole = ops.rope_attention(q, k, v, torch.arange(6, device=DEVICE).expand(2, 6))
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_one_row_of_each_cache_and_nothing_else(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, 1e4, 0.5)
    before = copies(given)
    ops.decode_attention(*given, backend=backend)
    q, k, v, key_cache, value_cache, lengths = given
    rotated = ops.apply_rope(k, lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        before[3][row, length], before[4][row, length] = rotated[row, 0], v[row, 0]
    torch.testing.assert_close(key_cache, before[3])
    for tensor, wanted in zip((q, k, v, value_cache, lengths), (*before[:3], *before[4:]), strict=True):
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_learns_that_the_caches_were_written_to(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, 1e4, 0.5)
    caches = [cache.requires_grad_() * 1 for cache in given[3:5]]
    given = (*given[:3], *caches, given[5])
    for cache in caches:
        loss = cache.square().sum()
        with torch.no_grad():
            ops.decode_attention(*given, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():  # whose tensors have no version
        ops.decode_attention(*copies(given), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_caches_that_are_parts_of_a_larger_one(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, 1e4, 0.5)
    # (S, layers, 2, B, H, D) as a cache of all layers might be, seen as (B, S, H, D).
    store = torch.zeros(7, 3, 2, 3, 2, 8, device=DEVICE)
    parts = [store[:, 1, i].transpose(0, 1) for i in range(2)]
    for part, cache in zip(parts, given[3:5], strict=True):
        part.copy_(cache)
    out = ops.decode_attention(*given[:3], *parts, given[5], backend=backend)
    torch.testing.assert_close(out, ops.decode_attention(*given, backend=backend))
    torch.testing.assert_close(parts[0], given[3])
    assert not store[:, 0].any() and not store[:, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, 1e4, 0.5)
    assert_well_formed("decode_attention_forward", *given, 1e4, 0.5, backend)


def test_compiles_without_graph_breaks():
    def two_steps(q, k, v, key_cache, value_cache, lengths):
        first = ops.decode_attention(q, k, v, key_cache, value_cache, lengths)
        return ops.decode_attention(first, k, v, key_cache, value_cache, lengths + 1)

    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((3, 0, 5), (2, 4)):
        given = inputs(lengths)
        other = copies(given)
        torch.testing.assert_close(compiled(*given), two_steps(*other))
        torch.testing.assert_close(given[3], other[3])


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(3, 2, 4, 8), r"q is \(3, 2, 4, 8\); it takes one token a row"),
        (0, torch.zeros(3, 4, 8), r"q is \(3, 4, 8\); it needs to be \(B, 1, Hq, D\)"),
        (0, torch.zeros(3, 1, 3, 8), "3 query heads are not a multiple of 2 key heads"),
        (1, torch.zeros(3, 1, 2, 6), r"k is \(3, 1, 2, 6\); q .* needs \(3, 1, 2, 8\)"),
        (2, torch.zeros(3, 1, 4, 8), r"v is \(3, 1, 4, 8\); k .* needs \(3, 1, 2, 8\)"),
        (3, torch.zeros(3, 7, 4, 8), r"key_cache is \(3, 7, 4, 8\); k .* needs \(3, 7, 2, 8\)"),
        (4, torch.zeros(3, 6, 2, 8), r"value_cache is \(3, 6, 2, 8\); key_cache .* needs \(3, 7, 2, 8\)"),
        (4, torch.zeros(3, 7, 2, 8).half(), "value_cache is torch.float16 and q torch.float32"),
        (5, torch.zeros(3), "lengths is torch.float32; it needs to be one of .*torch.int32"),
        (5, torch.zeros(2, dtype=torch.int64), r"lengths is \(2,\); q .* needs \(3,\)"),
        pytest.param(
            5,
            torch.tensor([0, 7, 1]),
            "lengths from 0 to 7 leave no room in a cache of 7 tokens",
            marks=ON_CPU,
        ),
        pytest.param(5, torch.tensor([0, -1, 1]), "lengths from -1 to 1 leave no room", marks=ON_CPU),
    ],
)
def test_refuses_what_does_not_fit(changed, value, message):
    given = list(inputs())
    given[changed] = here(value)
    with pytest.raises(ValueError, match=f"decode_attention: {message}"):
        ops.decode_attention(*given)


def test_says_why_triton_cannot_run():
    given = list(inputs())
    given[3] = random(3, 7, 2, 16)[..., ::2]
    with pytest.raises(ValueError, match="cannot run on 'triton' .* it needs caches whose heads are contiguous"):
        ops.decode_attention(*given, backend="triton")
    with pytest.raises(ValueError, match=r"cannot run on 'triton' .* a head of 130 is not in 1\.\.128"):
        ops.decode_attention(*inputs(dim=130), backend="triton")


@pytest.mark.parametrize("name", ["theta", "scale"])
def test_refuses_tensors_for_numbers(name):
    with pytest.raises(ValueError, match=rf"decode_attention: {name} is a tensor \(\); it needs to be a number"):
        ops.decode_attention(*inputs(), **{name: torch.tensor(2.0)})


def test_refuses_odd_heads():
    with pytest.raises(ValueError, match="a head of 7 is odd"):
        ops.decode_attention(*inputs(dim=7))


def test_has_no_gradient():
    q, *rest = inputs()
    with pytest.raises(ValueError, match=r"no gradient, and one is asked for: call it under torch.no_grad\(\)"):
        ops.decode_attention(q.requires_grad_(), *rest)
    with torch.no_grad():
        ops.decode_attention(q, *rest)


def test_says_why_cuda_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "cuda_refusals", lambda q, since: [])
    given = inputs(dim=20)
    with pytest.raises(ValueError, match="cannot run on 'cuda' .*: its heads are of 64 or 128, and these of 20"):
        ops.decode_attention(*given, backend="cuda")
    given = list(inputs(dim=64))
    given[3], given[4] = (random(cache.numel() + 1)[1:].view(cache.shape) for cache in given[3:5])
    with pytest.raises(ValueError, match="caches whose tokens begin at multiples of 16 bytes"):
        ops.decode_attention(*given, backend="cuda")
