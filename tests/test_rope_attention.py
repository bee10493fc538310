import pytest
import torch
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
from vlcore.ops.rope_attention import (
    KERNELS,
    RopeAttention,
    rope_attention_forward,
    rope_attention_reference,
)

BACKENDS = [*KERNELS, "torch"]


def inputs(batch=2, queries=7, keys=7, heads=4, key_heads=2, dim=8, dtype=torch.float32):
    q = random(batch, queries, heads, dim, dtype=dtype)
    k, v = (random(batch, keys, key_heads, dim, dtype=dtype) for _ in range(2))
    return q, k, v, torch.arange(3, keys + 3, device=q.device).expand(batch, keys)


def bounds(*offsets):
    return torch.tensor(offsets, dtype=torch.int32)


def through_op(backend, causal=True, cu_seqlens=None, scale=0.5):
    return lambda q, k, v, positions: RopeAttention.apply(q, k, v, positions, cu_seqlens, (1e4, causal, scale, backend))


def reference(causal=True, cu_seqlens=None, scale=0.5):
    return lambda q, k, v, positions: rope_attention_reference(q, k, v, positions, 1e4, causal, cu_seqlens, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"queries": 3},
        {"queries": 1},
        {"heads": 3, "key_heads": 3, "dim": 2},
        {"batch": 1, "queries": 1, "keys": 1, "heads": 1, "key_heads": 1},
        {"batch": 0},
        {"batch": 1, "queries": 130, "keys": 130, "heads": 2, "key_heads": 1, "dim": 64},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, causal, dtype):
    given = inputs(**sizes, dtype=dtype)
    skip_if_refused(KERNELS, backend, *given, 1e4, causal, None, 0.5)
    assert_matches(through_op(backend, causal), reference(causal), *given)


PACKINGS = [(0, 9), (0, 3, 6, 9), (0, 4, 9), (0, 1, 2, 9), (0, 0, 5, 5, 9)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offsets", PACKINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_match_the_reference(backend, offsets, causal):
    given, cu_seqlens = inputs(batch=1, queries=9, keys=9), bounds(*offsets)
    skip_if_refused(KERNELS, backend, *given, 1e4, causal, cu_seqlens, 0.5)
    assert_matches(through_op(backend, causal, cu_seqlens), reference(causal, cu_seqlens), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for sizes, offsets in (
        ({"queries": 129, "keys": 129, "dim": 80}, None),
        ({"queries": 63, "keys": 190, "dim": 32}, None),
        ({"queries": 131, "keys": 131, "dim": 18}, (0, 1, 1, 66, 131)),
    ):
        given = inputs(**sizes, batch=1, dtype=dtype)
        cu_seqlens = None if offsets is None else bounds(*offsets)
        skip_if_refused(KERNELS, "cpp", *given, 1e4, True, cu_seqlens, 0.5)
        for causal in (True, False):
            assert_matches(through_op("cpp", causal, cu_seqlens), reference(causal, cu_seqlens), *given)


def test_blocks_of_several_sequences():
    """Blocks that begin in one sequence and end in another, of heads whose halves are no powers of two."""
    given = inputs(batch=1, queries=101, keys=101, heads=2, key_heads=1, dim=34)
    cu_seqlens = bounds(0, 1, 1, 50, 101)
    skip_if_refused(KERNELS, "triton", *given, 1e4, True, cu_seqlens, 0.5)
    assert_matches(through_op("triton", True, cu_seqlens), reference(True, cu_seqlens), *given)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offsets", PACKINGS)
def test_packed_sequences_are_each_by_itself(offsets, causal):
    q, k, v, positions = inputs(batch=1, queries=9, keys=9)
    packed = ops.rope_attention(q, k, v, positions, causal=causal, cu_seqlens=bounds(*offsets))
    for start, end in zip(offsets, offsets[1:], strict=False):
        alone = (tensor[:, start:end] for tensor in (q, k, v, positions))
        torch.testing.assert_close(packed[:, start:end], ops.rope_attention(*alone, causal=causal))


def test_packing_holds_no_sequence():
    q, k, v, positions = inputs(batch=1, queries=0, keys=0)
    assert ops.rope_attention(q, k, v, positions, cu_seqlens=bounds(0)).shape == q.shape


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_the_formula(causal):
    q, k, v, positions = (t.double() if t.is_floating_point() else t for t in inputs(queries=4))
    angles = positions[..., None] * 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None]

    def rotated(x, turn):
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    keys, values = (x.repeat_interleave(2, 2) for x in (rotated(k, turn), v))
    scores = torch.einsum("bihd,bjhd->bhij", rotated(q, turn[:, -4:]), keys) * 8**-0.5
    hidden = torch.arange(7) > torch.arange(4)[:, None] + 3
    scores = scores.masked_fill(hidden, -torch.inf) if causal else scores
    wanted = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
    torch.testing.assert_close(ops.rope_attention(q, k, v, positions, causal=causal), wanted)


def test_the_last_queries_alone_give_the_last_rows():
    q, k, v, positions = inputs()
    whole = ops.rope_attention(q, k, v, positions, theta=500.0)
    torch.testing.assert_close(ops.rope_attention(q[:, -3:], k, v, positions, theta=500.0), whole[:, -3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, 1e4, True, None, 0.5)
    assert_strides_do_not_matter(through_op(backend), *given)
    assert_strides_do_not_matter(ops.rope_attention, *given)


@pytest.mark.parametrize("cu_seqlens", [None, bounds(0, 2, 4), bounds(0, 1, 4)])
def test_reference_gradient(cu_seqlens):
    q, k, v, positions = inputs(batch=1, queries=4, keys=4, heads=2, key_heads=1, dim=2)
    assert_gradcheck(lambda q, k, v: rope_attention_reference(q, k, v, positions, cu_seqlens=cu_seqlens), q, k, v)


@pytest.mark.parametrize("cu_seqlens", [None, bounds(0, 3, 7)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend, cu_seqlens):
    given = inputs(batch=1)
    skip_if_refused(KERNELS, backend, *given, 1e4, True, cu_seqlens, 0.5)
    numbers = (1e4, True, 0.5, backend)
    out, lse = assert_well_formed("rope_attention_forward", *given, cu_seqlens, *numbers)
    assert_well_formed("rope_attention_backward", torch.ones_like(out), *given, cu_seqlens, out, lse, *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums_stay_as_accurate(dtype):
    """4096 keys, of one head."""
    given = inputs(batch=1, queries=4096, keys=4096, heads=1, key_heads=1, dim=64, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, 1e4, True, None, 0.5)
    assert_matches(through_op("cpp"), reference(), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    given = inputs(batch=1, queries=600, keys=600, dim=32, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, 1e4, True, None, 0.5)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(values_and_gradients(through_op("cpp"), given))
    torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_views_of_one_projection_where_they_are(dtype):
    """Heads of q, k and v next to each other, at addresses off any boundary."""
    fused = random(1, 70 * 8 * 32 + 1, dtype=dtype)[:, 1:].view(1, 70, 8, 32)
    q, k, v = fused.split((4, 2, 2), 2)
    positions = torch.arange(70)[None]
    skip_if_refused(KERNELS, "cpp", q, k, v, positions, 1e4, True, None, 0.5)
    views = rope_attention_forward(q, k, v, positions, None, 1e4, True, 0.5, "cpp")
    copies = rope_attention_forward(*(x.clone() for x in (q, k, v)), positions, None, 1e4, True, 0.5, "cpp")
    assert torch.equal(views[0], copies[0]) and views[0].is_contiguous()
    assert_as_accurate(views[1], copies[1], copies[1].double())


def test_a_query_that_sees_one_key_moves_nothing():
    q, k, v, positions = inputs(batch=1, queries=1, keys=1, dim=64)
    skip_if_refused(KERNELS, "cpp", q, k, v, positions, 1e4, True, None, 0.5)
    out, grad_q, grad_k, _ = values_and_gradients(lambda *qkv: through_op("cpp")(*qkv, positions), (q, k, v))
    assert torch.equal(out[:, :, 0], v[:, :, 0]) and not grad_q.any() and not grad_k.any()


def test_compiles_without_graph_breaks():
    assert_compiles(ops.rope_attention, inputs(), inputs(batch=3, queries=9, keys=9))
    assert_compiles(through_op("torch"), inputs(), inputs(batch=3, queries=9, keys=9))


def test_packed_sequences_compile_without_graph_breaks():
    def packed(q, k, v, positions, cu_seqlens):
        return ops.rope_attention(q, k, v, positions, cu_seqlens=cu_seqlens)

    nine = inputs(batch=1, queries=9, keys=9)
    assert_compiles(packed, (*nine, bounds(0, 4, 9)), (*nine, bounds(0, 3, 4, 9)))


Q, K, POSITIONS = torch.zeros(2, 7, 4, 8), torch.zeros(2, 7, 2, 8), torch.zeros(2, 7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r"q is \(7, 4, 8\); it needs to be \(B, T, H, D\)"),
        ({"k": K[:1]}, r"k is \(1, 7, 2, 8\); q \(2, 7, 4, 8\) needs \(2, 7, 2, 8\)"),
        ({"v": K[..., :4]}, r"v is \(2, 7, 2, 4\); k \(2, 7, 2, 8\) needs"),
        ({"q": Q[:, :, :3]}, "3 query heads are not a multiple of 2 key heads"),
        ({"k": K.half()}, "k is torch.float16 and q torch.float32; they must agree"),
        ({"k": K[:, :5], "v": K[:, :5]}, "7 queries stand at the end of 5 keys"),
        ({"positions": POSITIONS[:, 1:]}, r"positions is \(2, 6\); k \(2, 7, 2, 8\) needs \(2, 7\)"),
        ({"positions": POSITIONS.float()}, "positions is torch.float32; it needs to be one of .*torch.int64"),
        ({"positions": POSITIONS.to("meta")}, "positions is on meta and k on cpu"),
        ({"q": Q[..., :7], "k": K[..., :7], "v": K[..., :7]}, "rotary positions turn pairs; a head of 7 is odd"),
        ({"cu_seqlens": bounds(0, 7)}, r"cu_seqlens packs sequences .* into B = 1; q is \(2, 7, 4, 8\)"),
        ({"theta": torch.tensor(1e6)}, r"theta is a tensor \(\); it needs to be a number"),
        ({"scale": torch.tensor(2.0)}, r"scale is a tensor \(\); it needs to be a number"),
    ],
)
def test_refuses_what_does_not_fit(changed, message):
    with pytest.raises(ValueError, match=f"rope_attention: {message}"):
        ops.rope_attention(**{"q": Q, "k": K, "v": K, "positions": POSITIONS, **changed})


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (bounds(0, 5), r"cu_seqlens \[0, 5\] must rise from 0 to the number of tokens, 7"),
        (bounds(1, 7), r"\[1, 7\] must rise from 0"),
        (bounds(0, 5, 4, 7), r"\[0, 5, 4, 7\] must rise"),
        (bounds(), r"\[\] must rise"),
        (bounds(0, 7).long(), r"cu_seqlens is \(2,\) torch.int64; it needs to be \(num_sequences \+ 1,\) torch.int32"),
        (bounds(0, 7)[None], r"cu_seqlens is \(1, 2\) torch.int32"),
    ],
)
def test_refuses_bounds_that_are_none(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        ops.rope_attention(Q[:1], K[:1], K[:1], POSITIONS[:1], cu_seqlens=cu_seqlens)


def test_packing_needs_as_many_queries_as_keys():
    with pytest.raises(ValueError, match=r"queries and keys alike .*k \(1, 7, 2, 8\)"):
        ops.rope_attention(Q[:1, :3], K[:1], K[:1], POSITIONS[:1], cu_seqlens=bounds(0, 7))


def test_says_why_a_backend_cannot_run():
    with pytest.raises(ValueError, match="rope_attention cannot run on 'cpp' .* float32 and bfloat16 only"):
        ops.rope_attention(Q.half(), K.half(), K.half(), POSITIONS, backend="cpp")
    with pytest.raises(ValueError, match="cannot run on 'cpp' .* it reads cu_seqlens on the CPU only"):
        ops.rope_attention(Q[:1], K[:1], K[:1], POSITIONS[:1], cu_seqlens=bounds(0, 7).to("meta"), backend="cpp")
    with pytest.raises(ValueError, match=r"cannot run on 'triton' .* a head of 130 is not in 1\.\.128"):
        ops.rope_attention(*(torch.zeros(1, 1, 1, 130) for _ in range(3)), POSITIONS[:1, :1], backend="triton")
