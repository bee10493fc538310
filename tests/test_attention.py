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
    values_and_gradients,
)

from vlcore import native, ops
from vlcore.ops.attention import KERNELS, Attention, attention_forward, attention_reference, triton_bounds
from vlcore.ops.dispatch import choose

BACKENDS = [*KERNELS, "torch"]


def inputs(batch=2, queries=7, keys=7, heads=4, key_heads=2, dim=8, dtype=torch.float32):
    q = random(batch, queries, heads, dim, dtype=dtype)
    return q, *(random(batch, keys, key_heads, dim, dtype=dtype) for _ in range(2))


def bounds(*offsets):
    return torch.tensor(offsets, dtype=torch.int32)


def through_op(backend, causal=False, cu_seqlens=None, scale=0.5):
    return lambda q, k, v: Attention.apply(q, k, v, cu_seqlens, (causal, scale, backend))


def reference(causal=False, cu_seqlens=None, scale=0.5):
    return lambda q, k, v: attention_reference(q, k, v, causal, cu_seqlens, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"queries": 3, "dim": 7},
        {"queries": 1},
        {"heads": 3, "key_heads": 3, "dim": 1},
        {"batch": 1, "queries": 1, "keys": 1, "heads": 1, "key_heads": 1},
        {"batch": 0},
        {"queries": 0},
        {"batch": 1, "queries": 130, "keys": 130, "heads": 2, "key_heads": 1, "dim": 64},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, causal, dtype):
    given = inputs(**sizes, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given, causal, None, 0.5)
    assert_matches(through_op(backend, causal), reference(causal), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for sizes, offsets in (
        ({"queries": 129, "keys": 200, "heads": 1, "key_heads": 1, "dim": 128}, None),
        ({"queries": 63, "keys": 63, "dim": 33}, None),
        ({"queries": 131, "keys": 131, "dim": 64}, (0, 0, 65, 131)),
    ):
        given, cu_seqlens = inputs(**sizes, batch=1, dtype=dtype), None if offsets is None else bounds(*offsets)
        skip_if_refused(KERNELS, "cpp", *given, True, cu_seqlens, 0.5)
        for causal in (True, False):
            assert_matches(through_op("cpp", causal, cu_seqlens), reference(causal, cu_seqlens), *given)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_what_is_not_finite_stays_in_its_sequence(monkeypatch, level, dtype, causal):
    monkeypatch.setattr(native, "level", level)
    sound = inputs(batch=1, queries=21, keys=21, dim=33, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *sound, causal, None, 0.5)
    # One thread goes from sequence to sequence of so few tokens.
    nans, infinities = (
        [x.new_full((1, tokens, *x.shape[2:]), value) for x in sound]
        for tokens, value in ((21, torch.nan), (19, torch.inf))
    )
    spoilt = [torch.cat(parts, 1) for parts in zip(nans, infinities, sound, strict=True)]
    grad_out = random(*sound[0].shape, dtype=dtype)
    alone = values_and_gradients(through_op("cpp", causal), sound, [grad_out])
    behind = values_and_gradients(
        through_op("cpp", causal, bounds(0, 40, 61)), spoilt, [F.pad(grad_out, (0, 0, 0, 0, 40, 0), value=1.0)]
    )
    assert all(x.isfinite().all() for x in alone)
    assert all(torch.equal(x[:, 40:], y) for x, y in zip(behind, alone, strict=True))


def test_torch_multiplies_behind_our_tiles_as_before_them():
    given = inputs(queries=70, keys=70, heads=2, dim=64, dtype=torch.bfloat16)
    skip_if_refused(KERNELS, "cpp", *given, False, None, 0.5)
    x, weight = random(64, 96, dtype=torch.bfloat16), random(80, 96, dtype=torch.bfloat16)
    q, k, v = (random(1, 2, 256, 64, dtype=torch.bfloat16) for _ in range(3))
    before = F.linear(x, weight), F.scaled_dot_product_attention(q, k, v)
    for _ in range(3):
        ops.attention(*given, backend="cpp")
        after = F.linear(x, weight), F.scaled_dot_product_attention(q, k, v)
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_scale(backend, scale):
    given = inputs(batch=1, queries=70, keys=150, heads=2, key_heads=1)
    skip_if_refused(KERNELS, backend, *given, False, None, scale)
    assert_matches(through_op(backend, True, None, scale), reference(True, None, scale), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart(dtype):
    """Maxima that rise from tile to tile, by more than an exponential can hold."""
    q, k, v = inputs(batch=1, queries=300, keys=300, heads=1, key_heads=1, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", q, k, v, True, None, 1.0)
    k = k * torch.linspace(0, 60, 300)[None, :, None, None].to(dtype)
    for causal in (True, False):
        assert_matches(through_op("cpp", causal, None, 1.0), reference(causal, None, 1.0), q, k, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offsets", [(0, 9), (0, 3, 6, 9), (0, 1, 2, 9), (0, 0, 5, 5, 9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_match_the_reference(backend, offsets, causal):
    given, cu_seqlens = inputs(batch=1, queries=9, keys=9), bounds(*offsets)
    skip_if_refused(KERNELS, backend, *given, causal, cu_seqlens, 0.5)
    assert_matches(through_op(backend, causal, cu_seqlens), reference(causal, cu_seqlens), *given)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_several_sequences(causal):
    """Blocks that begin in one sequence and end in another, behind an empty one."""
    given, cu_seqlens = inputs(batch=1, queries=101, keys=101, heads=2, key_heads=1, dim=18), bounds(0, 1, 1, 50, 101)
    skip_if_refused(KERNELS, "triton", *given, causal, cu_seqlens, 0.5)
    assert_matches(through_op("triton", causal, cu_seqlens), reference(causal, cu_seqlens), *given)


def test_reference_is_torch_attention():
    q, k, v = inputs(key_heads=4)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True), wanted)
    grouped = inputs()
    repeated = (x.repeat_interleave(2, 2) for x in grouped[1:])
    torch.testing.assert_close(ops.attention(*grouped), ops.attention(grouped[0], *repeated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums_stay_as_accurate(dtype):
    given = inputs(batch=1, queries=4096, keys=4096, heads=1, key_heads=1, dim=64, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, False, None, 0.5)
    with torch.no_grad():
        actual = ops.attention(*given, backend="cpp")
        exact = attention_reference(*(tensor.double() for tensor in given))
        assert_as_accurate(actual, attention_reference(*given), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_views_of_one_projection_where_they_are(dtype):
    """As SigLIP has them, at addresses off any boundary."""
    q, k, v = random(2, 70, 3 * 4 * 32 + 1, dtype=dtype)[..., 1:].unflatten(-1, (3, 4, 32)).unbind(2)
    skip_if_refused(KERNELS, "cpp", q, k, v, False, None, 0.5)
    out, _ = attention_forward(q, k, v, None, False, 0.5, "cpp")
    copies, _ = attention_forward(*(x.clone() for x in (q, k, v)), None, False, 0.5, "cpp")
    assert torch.equal(out, copies) and out.is_contiguous()
    assert_matches(through_op("cpp"), reference(), q, k, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype, causal):
    given = inputs(queries=550, keys=600, heads=3, key_heads=1, dim=32, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, causal, None, 0.5)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(values_and_gradients(through_op("cpp", causal), given))
    torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, False, None, 0.5)
    assert_strides_do_not_matter(through_op(backend), *given)
    assert_strides_do_not_matter(ops.attention, *given)


@pytest.mark.parametrize("cu_seqlens", [None, bounds(0, 2, 4), bounds(0, 1, 4)])
def test_reference_gradient(cu_seqlens):
    given = inputs(batch=1, queries=4, keys=4, heads=2, key_heads=1, dim=2)
    assert_gradcheck(lambda q, k, v: attention_reference(q, k, v, True, cu_seqlens), *given)


@pytest.mark.parametrize("cu_seqlens", [None, bounds(0, 3, 7)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend, cu_seqlens):
    given = inputs(batch=1)
    skip_if_refused(KERNELS, backend, *given, True, cu_seqlens, 0.5)
    numbers = (True, 0.5, backend)
    out, lse = assert_well_formed("attention_forward", *given, cu_seqlens, *numbers)
    assert_well_formed("attention_backward", torch.ones_like(out), *given, cu_seqlens, out, lse, *numbers)


def test_compiles_without_graph_breaks():
    assert_compiles(ops.attention, inputs(), inputs(batch=3, queries=9, keys=9))
    assert_compiles(through_op("torch"), inputs(), inputs(batch=3, queries=9, keys=9))
    packed = lambda q, k, v, cu_seqlens: ops.attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)  # noqa: E731
    nine = inputs(batch=1, queries=9, keys=9)
    assert_compiles(packed, (*nine, bounds(0, 4, 9)), (*nine, bounds(0, 3, 4, 9)))


Q, K = torch.zeros(2, 7, 4, 8), torch.zeros(2, 7, 2, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r": q is \(7, 4, 8\); it needs to be \(B, T, H, D\)"),
        ({"k": K[:1]}, r": k is \(1, 7, 2, 8\); q \(2, 7, 4, 8\) needs \(2, 7, 2, 8\)"),
        ({"v": K[..., :4]}, r": v is \(2, 7, 2, 4\); k \(2, 7, 2, 8\) needs"),
        ({"q": Q[:, :, :3]}, ": 3 query heads are not a multiple of 2 key heads"),
        ({"k": K.half()}, ": k is torch.float16 and q torch.float32; they must agree"),
        ({"k": K[:, :5], "v": K[:, :5]}, ": 7 queries stand at the end of 5 keys"),
        ({"cu_seqlens": bounds(0, 7)}, r": cu_seqlens packs sequences .* into B = 1; q is \(2, 7, 4, 8\)"),
        ({"cu_seqlens": bounds(0, 7).long()}, r": cu_seqlens is \(2,\) torch.int64; it needs to be"),
        ({"scale": torch.tensor([2.0])}, r": scale is a tensor \(1,\); it needs to be a number"),
        ({"backend": "mps"}, r" has no backend 'mps'; it has \['triton', 'cpp', 'torch'\]"),
    ],
)
def test_refuses_what_does_not_fit(changed, message):
    with pytest.raises(ValueError, match=f"attention{message}"):
        ops.attention(**{"q": Q, "k": K, "v": K, **changed})


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_refuses_bounds_that_are_none(backend):
    given = Q[:1], K[:1], K[:1]
    if backend != "auto":
        skip_if_refused(KERNELS, backend, *given, False, bounds(0, 5), 0.5)
    with pytest.raises(ValueError, match=r"attention: cu_seqlens \[0, 5\] must rise from 0 .* tokens, 7"):
        ops.attention(*given, cu_seqlens=bounds(0, 5), backend=backend)


def test_small_calls_are_left_to_torch():
    small, large = (inputs(batch=1, queries=size, keys=size, dim=64) for size in (8, 256))
    skip_if_refused(KERNELS, "cpp", *small, False, None, 0.5)
    assert choose("attention", KERNELS, "auto", *small, False, None, 0.5) == "torch"
    assert choose("attention", KERNELS, "auto", *large, False, None, 0.5) == "cpp"


def test_says_why_a_backend_cannot_run():
    with pytest.raises(ValueError, match="attention cannot run on 'cpp' .* 0.35355.*: .* float32 and bfloat16 only"):
        ops.attention(Q.half(), K.half(), K.half(), backend="cpp")
    with pytest.raises(ValueError, match=r"cannot run on 'triton' .* a head of 129 is not in 1\.\.128"):
        ops.attention(*(torch.zeros(1, 1, 1, 129) for _ in range(3)), backend="triton")
    with pytest.raises(ValueError, match="cannot run on 'triton' .* 1048561 tokens are more than 1048560"):
        ops.attention(*(torch.zeros(1, tokens, 1, 1) for tokens in (1, 1048561, 1048561)), backend="triton")


def test_bounds_that_are_not_looked_at_hold_a_sequence_at_least():
    with pytest.raises(ValueError, match=r"attention: cu_seqlens \(1,\) hold no sequence for 7 tokens"):
        triton_bounds("attention", bounds(0).to("meta"), Q)
