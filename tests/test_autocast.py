"""Operators and the model under torch.autocast: what is cast to what, whatever the sizes."""

import pytest
import torch
from checkpoints import siglip_only, telling_model
from conftest import DEVICE
from operators import random, skip_if_refused, values_and_gradients

from vlcore import ops
from vlcore.config import preset
from vlcore.decoding import KVCache, next_logits
from vlcore.ops.quantized_linear import KERNELS

WEIGHT = ops.quantize_weight(random(24, 32), 8)


def at_size(size):
    """Operators that multiply, and their arguments; of a size that torch runs and one that our kernels do."""
    q, tokens, grid = random(1, size, 2, 32), random(size, 64), random(1, 2, 16, 8)
    return {
        "linear": (lambda *given: ops.linear(*given, activation="gelu"), (tokens, random(512, 64), random(512))),
        "quantized_linear": (lambda x, bias: ops.quantized_linear(x, WEIGHT, bias), (random(size, 32), random(24))),
        "attention": (lambda *given: ops.attention(*given, causal=True), (q, q, q)),
        "rope_attention": (
            lambda *given: ops.rope_attention(*given, torch.arange(size, device=DEVICE)[None]),
            (q, q, q),
        ),
        "rel_pos_attention": (
            lambda *given: ops.rel_pos_attention(*given, (4, 4)),
            (grid, grid, grid, random(7, 8), random(7, 8)),
        ),
        "window_attention": (
            ops.window_attention,
            (random(1, 4, 4, 3, 2, 8), random(3, 2, 8), random(27, 8), random(27, 8)),
        ),
        "hybrid_adaptor": (
            ops.hybrid_adaptor,
            (tokens, tokens, random(256, 64), random(256), random(256, 64), random(256), random(128, 512), random(128)),
        ),
        "linear_cross_entropy": (
            lambda *given: ops.linear_cross_entropy(*given, torch.arange(size, device=DEVICE)),
            (tokens, random(2048, 64)),
        ),
    }


@pytest.mark.parametrize("rows", [8, 640])
@pytest.mark.parametrize("backend", [*KERNELS, "torch"])
def test_what_stands_in_a_graph_is_of_its_own_dtype(backend, rows):
    """As an exported one is called: the graph has been told the dtypes of what its operators give."""
    x, weight = random(rows, 32), (WEIGHT.values, WEIGHT.scales)
    skip_if_refused(KERNELS, backend, x, *weight, None, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = torch.ops.vlcore.quantized_linear_forward(x, *weight, None, 8, backend)
        grad_x = torch.ops.vlcore.quantized_linear_backward(y, *weight, 32, 8, backend)
    assert y.dtype == grad_x.dtype == torch.float32


@pytest.mark.parametrize("size", [8, 640])
@pytest.mark.parametrize("name", at_size(1))
def test_products_are_of_the_regions_dtype(name, size):
    """As of inputs that the caller has cast; gradients have the dtypes of what was given."""
    function, given = at_size(size)[name]

    def by_hand(*given):
        return function(*(x.bfloat16() for x in given))

    def under_autocast(*given):
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(*given)

    mixed = (given[0].bfloat16(), *given[1:])
    for inputs in (given, mixed):
        wanted, got = values_and_gradients(by_hand, inputs), values_and_gradients(under_autocast, inputs)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))
    assert got[0].dtype == (torch.float32 if name == "linear_cross_entropy" else torch.bfloat16)
    wide = tuple(x.double() for x in given)
    assert torch.equal(under_autocast(*wide), function(*wide))


def test_downsampled_features_are_of_the_regions_dtype_and_alpha_is_as_given():
    maps, alpha = random(2, 1, 4, 8, 8), random(1)
    weights = random(8, 4, 3, 3), random(8, 8, 3, 3)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ops.downsample_features(*maps, alpha, *weights, 16)
    low = [x.bfloat16() for x in (*maps, *weights)]
    assert torch.equal(got, ops.downsample_features(*low[:2], alpha, *low[2:], 16))


def test_a_residual_is_added_in_the_wider_dtype():
    x, weight, residual = random(3, 8), random(16, 8), random(3, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = ops.linear(x, weight, residual=residual)
        assert torch.equal(y, ops.linear(x, weight) + residual) and y.dtype == torch.float32
        with pytest.raises(ValueError, match=r"linear: residual is \(16,\); the product \(3, 16\) needs \(3, 16\)"):
            ops.linear(x, weight, residual=residual[0])


NORMS = {
    "rms_norm": lambda x, residual, weight: ops.rms_norm(x, weight),
    "add_rms_norm": lambda x, residual, weight: torch.stack(ops.add_rms_norm(x, residual, weight)),
    "layer_norm": lambda x, residual, weight: ops.layer_norm(x, weight, weight),
    "swiglu": lambda x, residual, weight: ops.swiglu(x, residual),
}


@pytest.mark.parametrize("size", [2, 300])
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_of_the_widest_dtype(name, size):
    x, residual, weight = random(size, 64), random(size, 64), random(64)
    for given in ((x.bfloat16(), residual, weight), (x, residual.bfloat16(), weight.bfloat16())):
        wanted = NORMS[name](*(tensor.float() for tensor in given))
        with torch.autocast(DEVICE, torch.bfloat16):
            got = NORMS[name](*given)
        assert torch.equal(got, wanted) and got.dtype == torch.float32
    low = [tensor.bfloat16() for tensor in (x, residual, weight)]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(NORMS[name](*low), NORMS[name](*low).bfloat16())
        assert NORMS[name](*low).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_a_backward_within_the_region_is_that_outside(name):
    x, residual, weight = (random(*shape).requires_grad_() for shape in ((300, 64), (300, 64), (64,)))
    y = {"rms_norm": lambda: ops.rms_norm(x, weight), "swiglu": lambda: ops.swiglu(x, residual)}[name]()
    grad_y = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, x, grad_y, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        (got,) = torch.autograd.grad(y, x, grad_y)
    assert torch.equal(got, wanted)


def test_a_graph_casts_as_eager_does():
    x, weight = random(640, 64), random(512, 64)

    def function(x, weight):
        with torch.autocast(DEVICE, torch.bfloat16):
            return ops.linear(ops.rms_norm(x, weight[0]), weight)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted, got = values_and_gradients(function, (x, weight)), values_and_gradients(compiled, (x, weight))
    assert all(a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))
    torch.testing.assert_close(got, wanted)


def test_decoding_is_of_the_caches_dtype():
    q, k, lengths = random(2, 1, 4, 8), random(2, 1, 2, 8), torch.tensor([1, 3], device=DEVICE)
    caches = random(2, 2, 5, 2, 8)
    wanted, written = ops.decode_attention(q.bfloat16().float(), k, k, *(kept := caches.clone()), lengths), kept
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ops.decode_attention(q.bfloat16(), k, k, *caches, lengths)
    assert torch.equal(got, wanted) and torch.equal(caches, written) and got.dtype == torch.float32


@pytest.mark.parametrize("kind", ["tiny", "mlp_gelu"])
def test_the_model_trains_under_autocast(kind):
    config = preset("tiny") if kind == "tiny" else siglip_only(preset("tiny"))
    model = telling_model(config).to(DEVICE).train()
    ids = torch.randint(4, 512, (1, 40), device=DEVICE)
    ids[0, : config.num_image_tokens] = config.image_token_id
    pixels = torch.rand(1, 3, config.image_size, config.image_size, device=DEVICE)
    wanted = model(ids, pixels, ids)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = model(ids, pixels, ids)
        padded = model(ids, pixels, ids, attention_mask=torch.ones_like(ids))
    assert got.hidden.dtype == padded.hidden.dtype == torch.float32  # the stream's
    torch.testing.assert_close(got.loss, wanted.loss, rtol=2e-2, atol=0)
    got.loss.backward()
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())
    assert model.vision.siglip.patch_embed.weight.grad is not None


@torch.no_grad()
def test_the_model_decodes_under_autocast_what_it_computes_at_once():
    model = telling_model(preset("tiny")).to(DEVICE)
    ids = torch.randint(4, 512, (2, 6), device=DEVICE)
    cache = KVCache(model.config.language, 2, 8, model.compute_dtype, DEVICE)
    cache.begin((5, 5))
    with torch.autocast(DEVICE, torch.bfloat16):
        positions = torch.arange(5, device=DEVICE).expand(2, 5)
        model(ids[:, :5], positions=positions, memory=cache, return_logits=False)
        cache.advance(0)
        logits = next_logits(model, cache)(ids[:, 5])
        whole = model(ids).logits[:, 5]
    assert (logits - whole).norm() / whole.norm() < 3e-2
