"""Layers that others put in the place of ours, or hook to: what they add is added wherever the layer has a part."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from public_models import example_inputs, make_telling
from torch import nn

from vlcore.config import preset
from vlcore.decoding import KVCache, next_logits
from vlcore.models import DeepSeekVL
from vlcore.models.layers import Linear

STEPS = 3
MERGED = {"rtol": 1e-4, "atol": 1e-4}


class Adapted(nn.Module):
    """As LoRA wraps a layer: layer(x) + x delta^T."""

    def __init__(self, layer, delta):
        super().__init__()
        self.layer, self.delta = layer, delta

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x, *args, **kwargs):
        return self.layer(x, *args, **kwargs) + F.linear(x, self.delta.to(x.dtype))


def small(adaptor="hybrid"):
    model = DeepSeekVL(replace(preset("tiny"), adaptor=adaptor)).eval()
    make_telling(model)
    return model


@pytest.fixture
def model():
    return small()


def outcome(model):
    """Logits and loss of a prompt with an image, and the logits of tokens that are decoded behind it."""
    ids, pixels = example_inputs(model.config, 1)
    labels = torch.where(ids == model.config.image_token_id, -100, ids)
    output = model(ids, pixels, labels, return_logits=True)
    with torch.inference_mode():
        cache = KVCache(model.config.language, 1, ids.shape[1] + STEPS, torch.float32, "cpu")
        cache.begin([ids.shape[1]])
        model(ids, pixels, positions=torch.arange(ids.shape[1])[None], memory=cache)
        step, decoded = next_logits(model, cache), []
        for token in range(4, 4 + STEPS):
            decoded.append(step(torch.tensor([token])))
            cache.advance()
    scores = model.loss(output.hidden, labels, "none")
    assert scores.shape == ids.shape
    return output.logits, output.loss, scores, torch.stack(decoded)


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, Linear)]


def kinds(model):
    """Of layers with the same part in different blocks, the first."""
    return {tuple(part for part in name.split(".") if not part.isdigit()): name for name in reversed(linears(model))}


CASES = [("hybrid", name) for name in sorted(kinds(small()).values())] + [("separate", "adaptor.low.fc1")]


@pytest.mark.parametrize(("adaptor", "name"), CASES)
def test_what_a_wrapper_adds_is_as_if_merged_into_the_weight(adaptor, name):
    model = small(adaptor)
    before, merged = outcome(model), copy.deepcopy(model)
    layer = merged.get_submodule(name)
    delta = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)) * layer.weight.std()
    with torch.no_grad():
        layer.weight += delta
    wanted = outcome(merged)
    model.set_submodule(name, Adapted(model.get_submodule(name), delta))
    for found, value, without in zip(outcome(model), wanted, before, strict=True):
        torch.testing.assert_close(found, value, **MERGED)
        assert not torch.allclose(value, without, **MERGED)


def test_plain_layers_of_torch_do_as_well(model):
    wanted = outcome(model)
    for name in linears(model):
        layer = model.get_submodule(name)
        replacement = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        replacement.load_state_dict(layer.state_dict())
        model.set_submodule(name, replacement)
    for found, value in zip(outcome(model), wanted, strict=True):
        torch.testing.assert_close(found, value, **MERGED)


def test_convolutions_can_be_replaced_too(model):
    wanted = outcome(model)
    for name, layer in list(model.vision.named_modules()):
        if type(layer).__name__ == "Conv2d":
            replacement = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=False
            )
            replacement.load_state_dict(layer.state_dict())
            model.vision.set_submodule(name, replacement)
    for found, value in zip(outcome(model), wanted, strict=True):
        torch.testing.assert_close(found, value, **MERGED)


@pytest.mark.parametrize("name", ["language", "language.layers.0", "language.layers.1.self_attn.k_proj", "lm_head"])
def test_hooks_are_called_for_every_token(model, name):
    calls, module = [], model.get_submodule(name)
    handle = module.register_forward_hook(lambda module, given, result: calls.append(module))
    wanted = outcome(model)
    # The forward with a loss, the prompt, and each step; the prompt's logits are the head's too.
    assert len(calls) >= 2 + STEPS
    handle.remove()
    for found, value in zip(outcome(model), wanted, strict=True):
        torch.testing.assert_close(found, value, **MERGED)


def test_what_a_hook_returns_counts(model):
    def twice(module, given, result):
        return 2 * result

    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("language.layers.0.mlp.down_proj", "vision.siglip.blocks.0.mlp.fc1"):
            model.get_submodule(name).register_forward_hook(twice)
            for parameter in merged.get_submodule(name).parameters():
                parameter *= 2
    for found, value in zip(outcome(model), outcome(merged), strict=True):
        torch.testing.assert_close(found, value, **MERGED)
