"""The whole model against transformers', with random weights at a telling scale."""

import dataclasses

import pytest
import torch
from public_models import copy_weights, example_inputs, public_inputs, public_model

from vlcore.config import LlamaConfig, SamConfig, SiglipConfig, VLConfig, preset
from vlcore.models import DeepSeekVL

LANGUAGE = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
SIGLIP = SiglipConfig(hidden_size=32, intermediate_size=128, num_layers=2, num_heads=4)
# The released models' grids, windows and paths, on narrow layers.
SAM = SamConfig(hidden_size=32, intermediate_size=128, num_layers=4, num_heads=4, neck_channels=8, global_layers=(1, 3))
SIGLIP_ONLY = VLConfig(
    siglip=SIGLIP, sam=None, adaptor="mlp_gelu", language=LANGUAGE, image_token_id=100, pad_color=(127, 127, 127)
)
CONFIGS = {
    "hybrid": VLConfig(siglip=SIGLIP, sam=SAM, language=LANGUAGE, image_token_id=100),
    "siglip_only": SIGLIP_ONLY,
    "tiny": preset("tiny"),
    "demo": preset("demo"),
    "tied": dataclasses.replace(SIGLIP_ONLY, language=dataclasses.replace(LANGUAGE, tie_embeddings=True)),
}


def pair(name, folder):
    public, ours = public_model(CONFIGS[name], folder), DeepSeekVL(CONFIGS[name]).eval()
    copy_weights(public, ours)
    return public, ours


def likeliest_text(output, config):
    return output.logits[0, -1].index_fill(0, torch.tensor(config.image_token_id), -torch.inf).argmax()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_same_logits_and_same_greedy_tokens(name, tmp_path):
    public, ours = pair(name, tmp_path)
    ids, pixels = example_inputs(ours.config, 1 if ours.config.image_size == 1024 else 2)
    features = ours.encode_images(pixels)
    images = public_inputs(ours.config, pixels)
    public_features = public.model.get_image_features(**images, return_dict=True)
    # The images are encoded once, not again for every token.
    public.model.get_image_features = lambda *given, **named: public_features
    expected = public(input_ids=ids, **images).logits
    assert expected.std() > 0.5
    assert (ours(ids, image_features=features).logits - expected).abs().max() <= 1e-4

    chosen = []
    for _ in range(16):
        token = likeliest_text(ours(ids, image_features=features), ours.config)
        public_output = public(input_ids=ids, **images, logits_to_keep=1)
        assert token == likeliest_text(public_output, ours.config)
        chosen.append(token.item())
        ids = torch.cat((ids, token.view(1, 1)), 1)
    assert len(set(chosen)) >= 6, f"tokens that repeat prove little: {chosen}"


@pytest.mark.parametrize("name", ["tiny", "siglip_only", "tied"])
def test_same_loss_and_same_gradients(name, tmp_path):
    public, ours = pair(name, tmp_path)
    ids, pixels = example_inputs(ours.config, 1)
    labels = torch.where(ids == ours.config.image_token_id, -100, ids)
    public_loss = public(input_ids=ids, labels=labels, **public_inputs(ours.config, pixels)).loss
    loss = ours(ids, pixels, labels).loss
    torch.testing.assert_close(loss, public_loss, rtol=1e-5, atol=1e-5)
    public_loss.backward()
    loss.backward()
    expected = DeepSeekVL(ours.config)
    with torch.no_grad():
        for parameter in public.parameters():
            parameter.copy_(parameter.grad)
    copy_weights(public, expected)
    for (name, parameter), wanted in zip(ours.named_parameters(), expected.parameters(), strict=True):
        worst = (parameter.grad - wanted).abs().max() / wanted.abs().max().clamp(min=1e-4)
        assert worst <= 1e-3, f"{name}: {worst:.2g}"
