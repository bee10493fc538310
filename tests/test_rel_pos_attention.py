from importlib import import_module

import pytest
import torch
from accuracy import assert_as_accurate
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
    shifted,
    skip_if_refused,
    values_and_gradients,
)

from vlcore import native, ops
from vlcore.kernels import launch
from vlcore.ops.dispatch import gradients
from vlcore.ops.rel_pos_attention import KERNELS, RelPosAttention, rel_pos_attention_reference

BACKENDS = [*KERNELS, "torch"]


def inputs(batch=2, heads=3, grid=(3, 5), dim=8, dtype=torch.float32):
    height, width = grid
    q, k, v = (random(batch, heads, height * width, dim, dtype=dtype) for _ in range(3))
    return q, k, v, random(2 * height - 1, dim, dtype=dtype), random(2 * width - 1, dim, dtype=dtype)


def through_op(backend, grid=(3, 5)):
    return lambda *given: RelPosAttention.apply(*given, *grid, backend)


def reference(grid=(3, 5)):
    return lambda *given: rel_pos_attention_reference(*given, grid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": 1, "heads": 1, "grid": (1, 1), "dim": 1},
        {"grid": (1, 7)},
        {"grid": (14, 14), "dim": 64, "batch": 1, "heads": 1},
        {"batch": 0},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, sizes, dtype):
    given, grid = inputs(**sizes, dtype=dtype), sizes.get("grid", (3, 5))
    skip_if_refused(KERNELS, backend, *given, grid)
    assert_matches(through_op(backend, grid), reference(grid), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_every_level_of_instructions(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    for grid, dim in (((9, 7), 33), ((3, 64), 64), ((2, 70), 80), ((14, 14), 64), ((8, 8), 32), ((2, 33), 128)):
        given = inputs(batch=1, heads=2, grid=grid, dim=dim, dtype=dtype)
        skip_if_refused(KERNELS, "cpp", *given, grid)
        assert_matches(through_op("cpp", grid), reference(grid), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_maxima_rise_from_panel_to_panel(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    q, k, v, rel_pos_h, rel_pos_w = inputs(batch=1, heads=2, grid=(9, 64), dim=64, dtype=dtype)
    # By image rows: a head's scores rise all the way, by so much that earlier weights are nothing; the other's now and
    # then.
    q, k = q.abs(), k.abs()
    k[0, 0] *= torch.arange(9).repeat_interleave(64)[:, None]
    k[0, 1] *= torch.tensor([1, 1, 4, 1, 1, 6, 1, 1, 9]).repeat_interleave(64)[:, None]
    given = (q, k, v, rel_pos_h, rel_pos_w)
    skip_if_refused(KERNELS, "cpp", *given, (9, 64))
    assert_matches(through_op("cpp", (9, 64)), reference((9, 64)), *given)
    # One key of a late row takes all, with a score whose exponential float32 does not hold.
    q, k, tables = torch.full_like(q, 4), torch.zeros_like(k), [torch.zeros_like(x) for x in given[3:]]
    k[:, :, 300] = 4
    out = RelPosAttention.apply(q, k, v, *tables, 9, 64, "cpp")
    assert torch.equal(out, v[:, :, 300:301].expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", range(native.level + 1))
def test_what_is_not_finite_stays_in_its_head(monkeypatch, level, dtype):
    monkeypatch.setattr(native, "level", level)
    sound = inputs(batch=1, heads=1, grid=(5, 7), dim=33, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *sound, (5, 7))
    # One thread goes from head to head of so few numbers.
    spoilt = [torch.cat([torch.full_like(x, torch.nan), x], 1) for x in sound[:3]]
    grad_out = random(*sound[0].shape, dtype=dtype)
    alone, behind = (
        values_and_gradients(lambda *qkv: through_op("cpp", (5, 7))(*qkv, *sound[3:]), given, [grad])
        for given, grad in ((sound[:3], grad_out), (spoilt, torch.cat([grad_out, grad_out], 1)))
    )
    assert all(x.isfinite().all() for x in alone)
    assert behind[0][:, 0].isnan().all()
    assert all(torch.equal(x[:, 1:], y) for x, y in zip(behind, alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_stay_as_accurate(backend):
    """A global block's 4096 keys, of one head of SAM; 512 of them where Triton is interpreted."""
    grid = (8, 64) if backend == "triton" and launch.INTERPRETED else (64, 64)
    given = inputs(batch=1, heads=1, grid=grid, dim=64)
    skip_if_refused(KERNELS, backend, *given, grid)
    with torch.no_grad():
        actual = ops.rel_pos_attention(*given, grid, backend=backend)
        exact = ops.rel_pos_attention(*(tensor.double() for tensor in given), grid)
    assert_as_accurate(actual, reference(grid)(*given), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{"grid": (9, 1)}, {"grid": (3, 6), "dim": 80}, {"grid": (3, 66), "dim": 16}])
def test_triton_on_odd_grids(sizes, dtype):
    """Columns in several blocks, rows that fill none, heads that fill no block, softmaxes without correction."""
    given, grid = inputs(**sizes, batch=1, heads=1, dtype=dtype), sizes["grid"]
    skip_if_refused(KERNELS, "triton", *given, grid)
    assert_matches(through_op("triton", grid), reference(grid), *given)


def test_triton_takes_keys_and_values_of_different_strides():
    q, k, v, *tables = inputs()
    skip_if_refused(KERNELS, "triton", q, k, v, *tables, (3, 5))
    spread = q, k, v.transpose(1, 2).contiguous().transpose(1, 2), *tables
    for got, wanted in zip(
        values_and_gradients(through_op("triton"), spread),
        values_and_gradients(through_op("triton"), (q, k, v, *tables)),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_triton_refuses_wide_heads():
    with pytest.raises(ValueError, match="heads of 136 are wider than 128"):
        ops.rel_pos_attention(*inputs(dim=136), (3, 5), backend="triton")


@pytest.mark.parametrize("grid", [(1 << 16, 1), (1, 1 << 16), (512, 512)])
def test_triton_refuses_grids_that_it_cannot_count_in(grid):
    height, width = grid
    many = torch.empty(1, 1, height * width, 1, device=DEVICE)
    tables = (torch.empty(2 * side - 1, 1, device=DEVICE) for side in grid)
    with pytest.raises(ValueError, match=f"{height} x {width} are too many places"):
        ops.rel_pos_attention(many, many, many, *tables, grid, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_long_sums_stay_as_accurate(dtype):
    """Many blocks of queries and panels of keys, and scores as even as a model's."""
    q, k, v, rel_pos_h, rel_pos_w = inputs(batch=1, heads=1, grid=(32, 40), dim=64, dtype=dtype)
    given = q, k, v, rel_pos_h * 0.1, rel_pos_w * 0.1
    skip_if_refused(KERNELS, "cpp", *given, (32, 40))
    assert_matches(through_op("cpp", (32, 40)), reference((32, 40)), *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_threads_nor_on_addresses(dtype):
    given = inputs(batch=1, heads=2, grid=(14, 20), dim=32, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", *given, (14, 20))
    run, threads = through_op("cpp", (14, 20)), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(values_and_gradients(run, given))
    torch.set_num_threads(threads)
    results.append(values_and_gradients(run, tuple(shifted(tensor) for tensor in given)))
    for other in results[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_the_views_of_a_fused_projection(dtype):
    """As SAM makes them: q, k and v are strided, and what comes out is contiguous by tokens."""
    fused = random(2, 15, 3, 2, 16, dtype=dtype)
    tables = random(5, 16, dtype=dtype), random(9, 16, dtype=dtype)
    skip_if_refused(KERNELS, "cpp", fused, fused, fused, *tables, (3, 5))
    views = fused.permute(2, 0, 3, 1, 4)
    strided = values_and_gradients(through_op("cpp"), (*views, *tables))
    copied = values_and_gradients(through_op("cpp"), (*(view.contiguous() for view in views), *tables))
    assert all(torch.equal(got, wanted) for got, wanted in zip(strided, copied, strict=True))
    assert strided[0].transpose(1, 2).is_contiguous()


def test_reference_is_the_formula():
    height, width = grid = (3, 5)
    q, k, v, rel_pos_h, rel_pos_w = (tensor.double() for tensor in inputs())
    y, x = (torch.arange(height * width) // width, torch.arange(height * width) % width)
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    for query in range(height * width):
        for key in range(height * width):
            table = rel_pos_h[y[query] - y[key] + height - 1] + rel_pos_w[x[query] - x[key] + width - 1]
            scores[..., query, key] += q[..., query, :] @ table
    torch.testing.assert_close(ops.rel_pos_attention(q, k, v, rel_pos_h, rel_pos_w, grid), scores.softmax(-1) @ v)


def test_chunks_change_nothing(monkeypatch):
    given = inputs()
    at_once = reference()(*given), *gradients(reference(), given, torch.ones_like(given[0]))
    # Room for the scores of four heads of 15 tokens: chunks of 4 and 2.
    monkeypatch.setattr(import_module("vlcore.ops.rel_pos_attention"), "_CHUNK_SCORES", 4 * 15**2)
    in_chunks = reference()(*given), *gradients(reference(), given, torch.ones_like(given[0]))
    for got, wanted in zip(in_chunks, at_once, strict=True):
        torch.testing.assert_close(got, wanted)


def test_compiles_in_chunks(monkeypatch):
    monkeypatch.setattr(import_module("vlcore.ops.rel_pos_attention"), "_CHUNK_SCORES", 4 * 15**2)
    assert_compiles(lambda *given: ops.rel_pos_attention(*given, (3, 5)), inputs())
    assert_compiles(through_op("torch"), inputs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_is_not_contiguous(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, (3, 5))
    assert_strides_do_not_matter(through_op(backend), *given)
    assert_strides_do_not_matter(lambda *given: ops.rel_pos_attention(*given, (3, 5)), *given)


def test_reference_gradient():
    assert_gradcheck(reference((2, 3)), *inputs(batch=1, heads=2, grid=(2, 3), dim=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_well_formed_torch_operator(backend):
    given = inputs()
    skip_if_refused(KERNELS, backend, *given, (3, 5))
    out, lse = assert_well_formed("rel_pos_attention_forward", *given, 3, 5, backend)
    assert_well_formed("rel_pos_attention_backward", torch.ones_like(out), *given, out, lse, 3, 5, backend)


def test_compiles_without_graph_breaks():
    assert_compiles(lambda *given: ops.rel_pos_attention(*given, (3, 5)), inputs(), inputs(batch=4))
    assert_compiles(through_op("torch"), inputs(), inputs(batch=4))


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(3, 15, 8), r"q is \(3, 15, 8\); it needs to be \(B, H, Y\*X, D\)"),
        (0, torch.zeros(2, 3, 14, 8), r"q has 14 tokens; a grid of \(3, 5\) has 15"),
        (1, torch.zeros(2, 3, 15, 4), r"k is \(2, 3, 15, 4\); q \(2, 3, 15, 8\) needs"),
        (2, torch.zeros(2, 1, 15, 8), r"v is \(2, 1, 15, 8\); q \(2, 3, 15, 8\) needs"),
        (3, torch.zeros(9, 8), r"rel_pos_h is \(9, 8\); a grid of \(3, 5\) and heads of 8 need \(5, 8\)"),
        (4, torch.zeros(5, 8), r"rel_pos_w is \(5, 8\); a grid of \(3, 5\) and heads of 8 need \(9, 8\)"),
        (4, torch.zeros(9, 8).half(), "rel_pos_w is torch.float16 and q torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(changed, value, message):
    given = list(inputs())
    given[changed] = here(value)
    with pytest.raises(ValueError, match=f"rel_pos_attention: {message}"):
        ops.rel_pos_attention(*given, (3, 5))
