"""Models of integers: close to what they were, generating, and never written as what they are not."""

import copy

import pytest
import torch
from checkpoints import telling_model

import vlcore
from vlcore.config import preset
from vlcore.decoding import KVCache
from vlcore.models import DeepSeekVL, init_weights
from vlcore.models.layers import move_side_by_side
from vlcore.models.quantized import QuantizedLinear, quantize
from vlcore.ops.decode_block import side_by_side

FORMS = [(8, None, 0.02), (8, 32, 0.02), (4, None, 0.4), (4, 32, 0.3)]


@pytest.fixture
def model():
    model = DeepSeekVL(preset("tiny")).eval()
    init_weights(model, seed=0)
    return model


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize(("bits", "group_size", "limit"), FORMS)
@torch.no_grad()
def test_logits_stay_close(model, bits, group_size, limit):
    ids = torch.randint(4, 512, (2, 40))
    before = model(ids).logits
    quantize(model, bits, group_size)
    error = (model(ids).logits - before).norm() / before.norm()
    assert 0 < error < limit


@pytest.mark.parametrize(("bits", "group_size", "_"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decodes_what_a_forward_computes(model, dtype, bits, group_size, _):
    model = model.to(dtype)
    quantize(model, bits, group_size)
    ids = torch.randint(4, 512, (2, 6))
    cache = KVCache(model.config.language, 2, 8, dtype, "cpu")
    cache.begin((5, 5))
    model(ids[:, :5], positions=torch.arange(5).expand(2, 5), memory=cache, return_logits=False)
    cache.advance(0)
    hidden = model.decode(ids[:, 5], model.language.operands(dtype), cache.keys, cache.values, cache.lengths)
    whole = model(ids).hidden[:, 5]
    assert (hidden - whole).norm() / whole.norm() < (1e-5 if dtype == torch.float32 else 3e-2)


def test_a_compiled_model_is_quantised_inside_its_wrapper(model):
    ids = torch.randint(4, 512, (1, 8))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(ids).logits
        quantize(compiled, 8)
        after = compiled(ids).logits
    assert quantized_layers(model) and torch.equal(after, model(ids).logits) and not torch.equal(after, before)


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, lambda model: model.language, lambda model: model.lm_head])
def test_what_is_no_model_is_refused(model, wrap, tmp_path):
    wrapper = wrap(model)
    for call in (quantize, lambda model: vlcore.save_pretrained(model, tmp_path / "model")):
        with pytest.raises(ValueError, match=f": it takes a DeepSeekVL, and this is a {type(wrapper).__name__}"):
            call(wrapper)
    assert not quantized_layers(model) and not (tmp_path / "model").exists()


def test_integers_take_the_place_of_the_language_models_layers_alone(model):
    embedding = model.language.embed_tokens.weight
    size = sum(p.nbytes for p in model.language.layers.parameters())
    quantize(model, 4, lm_head=False)
    layers = quantized_layers(model)
    assert set(layers) == {name for name in layers if name.startswith("language.layers.")}
    assert len(layers) == 7 * model.config.language.num_layers
    assert model.language.embed_tokens.weight is embedding and not isinstance(model.lm_head, QuantizedLinear)
    held = sum(b.nbytes for b in model.language.layers.buffers())
    assert held < size / 6
    assert not any(module.training for module in model.modules())


def test_a_tied_head_gets_a_weight_of_its_own():
    config = preset("tiny")
    model = telling_model(config)
    model.lm_head.weight = model.language.embed_tokens.weight
    before = model.language.embed_tokens.weight.clone()
    quantize(model)
    assert isinstance(model.lm_head, QuantizedLinear) and torch.equal(model.language.embed_tokens.weight, before)


def test_scales_stay_float32(model):
    quantize(model, 8)
    scales = model.lm_head.scales.clone()
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model.lm_head.scales, scales) and model.lm_head.values.dtype == torch.int8
    assert "bits=8" in repr(model.lm_head)


@torch.no_grad()
def test_has_a_loss(model):
    ids = torch.randint(4, 512, (1, 12))
    before = model(ids, labels=ids).loss
    quantize(model, 8)
    torch.testing.assert_close(model(ids, labels=ids).loss, before, rtol=1e-2, atol=0)


def test_is_not_written(model, tmp_path):
    quantize(model)
    message = "save_pretrained: language.layers.0.self_attn.q_proj holds integers, and neither layout has a place"
    with pytest.raises(ValueError, match=message):
        vlcore.save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3,), "3 bits are neither 8 nor 4"), ((8, 48), "group_size 48 is not one of .* inputs of language.layers.0")],
)
def test_refuses_what_does_not_fit(model, arguments, message):
    with pytest.raises(ValueError, match=f"quantize: {message}"):
        quantize(model, *arguments)
    assert not quantized_layers(model)


def test_refuses_what_is_not_finite_or_quantised_already(model):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="quantize: the weight of lm_head holds values that are not finite"):
        quantize(model)
    assert not quantized_layers(model)
    quantize(model, lm_head=False)
    with pytest.raises(ValueError, match="quantised already: language.layers.0.self_attn.q_proj holds integers"):
        quantize(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="weights are laid side by side on GPUs")
@pytest.mark.parametrize("form", [None, (8, None), (4, 32)])
def test_on_a_gpu_weights_that_read_the_same_are_neighbours(model, form):
    if form:
        quantize(model, *form)
    for _ in range(2):
        for layer in model.cuda().language.layers:
            _, _, *weights = layer.operands(torch.float32)
            assert side_by_side(weights[:3]) is not None and side_by_side(weights[4:6]) is not None
        model.cpu()


@torch.no_grad()
def test_neighbouring_weights_are_kept_copied_and_written_as_others_are(model, tmp_path):
    ids = torch.randint(4, 512, (1, 6))
    before = model(ids).logits
    for layer in model.language.layers:
        attention, mlp = layer.self_attn, layer.mlp
        move_side_by_side([x.weight for x in (attention.q_proj, attention.k_proj, attention.v_proj)])
        move_side_by_side([x.weight for x in (mlp.gate_proj, mlp.up_proj)])
    vlcore.save_pretrained(model, tmp_path)
    for other in (model, copy.deepcopy(model), vlcore.from_pretrained(tmp_path)):
        assert torch.equal(other(ids).logits, before)


def test_models_with_layers_of_others_are_moved(model):
    for module in (model.language.layers[0].self_attn, model.language.layers[0].mlp):
        for name, _ in list(module.named_children())[:2]:
            setattr(module, name, torch.nn.Identity())
    assert model.to(torch.float64).language.norm.weight.dtype == torch.float64
