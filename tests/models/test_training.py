"""What training relies on: frozen towers without a graph, activation checkpointing, torch.compile."""

from functools import partial

import pytest
import torch
from public_models import example_inputs, make_telling

from vlcore.config import preset
from vlcore.decoding import KVCache
from vlcore.models import DeepSeekVL


def trainable(*parts):
    model = DeepSeekVL(preset("tiny"))
    make_telling(model)
    for name, parameters in model.parts().items():
        for parameter in parameters:
            parameter.requires_grad_(name in parts)
    return model


def example(model):
    ids, pixels = example_inputs(model.config, 1, 4)
    return ids, pixels, torch.where(ids == model.config.image_token_id, -100, ids)


@pytest.mark.parametrize("parts", [("adaptor",), ("adaptor", "language"), ("siglip", "adaptor", "language")])
def test_frozen_parts_keep_no_graph_and_get_no_gradient(parts):
    model = trainable(*parts)
    ids, pixels, labels = example(model)
    features = model.encode_towers(pixels)
    assert features.low.requires_grad == ("siglip" in parts)
    assert not features.detail.requires_grad and not features.skip.requires_grad
    model(ids, pixels, labels).loss.backward()
    for name, parameters in model.parts().items():
        assert all((parameter.grad is not None) == (name in parts) for parameter in parameters), name


def test_features_of_frozen_towers_can_be_kept():
    model = trainable("adaptor")
    ids, pixels, labels = example(model)
    model(ids, pixels, labels).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parts()["adaptor"]]
    model.zero_grad()
    kept = model.encode_towers(pixels)
    model(ids, image_features=model.adapt(kept), labels=labels).loss.backward()
    for parameter, gradient in zip(model.parts()["adaptor"], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_activation_checkpointing_changes_no_gradient():
    model = trainable("sam", "siglip", "adaptor", "language")
    ids, pixels, labels = example(model)
    model(ids, pixels, labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        for stack in (model.vision.sam.blocks, model.vision.siglip.blocks, model.language.layers)
        for block in stack
    ]
    for part in (model.vision.sam, model.vision.siglip, model.language):
        part.activation_checkpointing = True
    model(ids, pixels, labels).loss.backward()
    assert len(calls) == 2 * len(hooks), "every block runs again in the backward pass"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_bfloat16_compute_gives_float32_gradients():
    model = trainable("sam", "siglip", "adaptor", "language")
    ids, pixels, labels = example(model)
    model.compute_dtype = torch.bfloat16
    loss = model(ids, pixels, labels).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_language_model_compiles_into_one_graph():
    model = trainable("language")
    embeddings = torch.randn(1, 10, 64)
    positions = torch.arange(10)[None]
    compiled = torch.compile(model.language, fullgraph=True, backend="aot_eager")
    expected = model.language(embeddings, positions)
    torch.testing.assert_close(compiled(embeddings, positions), expected, rtol=1e-4, atol=1e-4)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = model.language(embeddings, positions, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(compiled(embeddings, positions, cu_seqlens=cu_seqlens), packed, rtol=1e-4, atol=1e-4)


def test_the_whole_step_compiles_into_one_graph():
    model = trainable("sam", "siglip", "adaptor", "language")
    ids, pixels, labels = example(model)
    model(ids, pixels, labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(lambda *batch: model(*batch).loss, fullgraph=True, backend="aot_eager")
    compiled(ids, pixels, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    with pytest.raises(RuntimeError, match="do not hold as many image placeholders as the images need"):
        compiled(ids.masked_fill(ids == model.config.image_token_id, 5), pixels, labels)


@torch.no_grad()
def test_encoding_and_decoding_compile_into_one_graph():
    model = trainable()
    model.compute_dtype = torch.bfloat16
    ids, pixels, _ = example(model)
    caches = [KVCache(model.config.language, 1, ids.shape[1] + 1, torch.bfloat16, "cpu") for _ in range(2)]
    results = []
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    for cache, compile in zip(caches, (lambda function: function, compiled), strict=True):
        features = compile(model.encode_images)(pixels)
        cache.begin([ids.shape[1]])
        positions = torch.arange(ids.shape[1])[None]
        model(ids, image_features=features, positions=positions, memory=cache)
        decode = compile(model.decode)
        operands = model.language.operands(torch.bfloat16)
        results.append((features, decode(ids[:, -1], operands, cache.keys, cache.values, cache.lengths)))
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(caches[1].keys + caches[1].values, caches[0].keys + caches[0].values, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_layer_compiles_to_machine_code():
    """With torch.compile's own backend, whose generated kernels stand between our operators."""
    layer = trainable("language").language.layers[0]
    x, positions = torch.randn(1, 10, 64), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)

    def run(function):
        inputs = [x.clone().requires_grad_(), x.flip(1).requires_grad_()]
        outputs = function(*inputs, positions, cu_seqlens, None)
        return *outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), [*inputs, *layer.parameters()])

    for got, wanted in zip(run(torch.compile(layer, fullgraph=True)), run(layer), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
