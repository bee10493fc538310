"""Each tower and the adaptor apart, against transformers'; SAM-B and SigLIP-L once at their real sizes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from public_models import ALPHA, copy_weights, example_inputs, make_telling, public_config, public_inputs, public_model
from transformers import AutoModel

from vlcore import layouts
from vlcore.config import SiglipConfig, VLConfig, preset
from vlcore.models import DeepSeekVL, TowerFeatures
from vlcore.models.adaptor import make_adaptor
from vlcore.models.sam import Sam
from vlcore.models.siglip import Siglip
from vlcore.models.vision import Vision


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def tiny_pair(tmp_path):
    config = preset("tiny")
    public, ours = public_model(config, tmp_path), DeepSeekVL(config).eval()
    copy_weights(public, ours)
    return public, ours


@torch.no_grad()
def test_siglip_alone(tiny_pair):
    public, ours = tiny_pair
    _, pixels = example_inputs(ours.config)
    expected = public.model.vision_model(public_inputs(ours.config, pixels)["pixel_values"]).last_hidden_state
    torch.testing.assert_close(ours.vision.siglip(pixels, torch.float32), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sam_alone_and_behind_its_convolutions(tiny_pair):
    public, ours = tiny_pair
    _, pixels = example_inputs(ours.config)
    high_pixels = public_inputs(ours.config, pixels)["high_res_pixel_values"]
    detail, skip = ours.vision.sam(pixels, torch.float32)
    expected = public.model.high_res_vision_model(high_pixels, output_hidden_states=True)
    tapped = expected.hidden_states[ours.config.sam.global_layers[0] + 1]
    torch.testing.assert_close(detail, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(skip, public.model.high_res_vision_neck(tapped), rtol=1e-4, atol=1e-5)

    tokens = public.model.get_high_res_image_features(high_pixels).last_hidden_state
    torch.testing.assert_close(ours.vision.downsample(detail, skip), tokens, rtol=1e-4, atol=1e-5)
    # transformers leaves the second branch out where alpha is 0; ours must not have been carried by the first alone.
    assert relative_error(ours.vision.downsample(detail, torch.zeros_like(skip)), tokens) > 0.05
    assert ours.vision.downsample.alpha.item() == pytest.approx(ALPHA)


@torch.no_grad()
def test_adaptor_alone(tiny_pair):
    public, ours = tiny_pair
    low, high = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    torch.testing.assert_close(ours.adaptor(low, high), public.model.aligner(low, high), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_siglips_input_is_the_antialiased_image():
    """The public model resizes the padded image with antialiasing; Pillow's bilinear filter, on float images, is it."""
    config = SiglipConfig(image_size=48, patch_size=8, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2)
    siglip = Siglip(config).eval()
    make_telling(siglip)
    image = torch.rand(1, 3, 100, 100)
    channels = [Image.fromarray(channel.numpy()).resize((48, 48), Image.Resampling.BILINEAR) for channel in image[0]]
    resized = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))[None]
    torch.testing.assert_close(siglip(image, torch.float32), siglip(resized, torch.float32), rtol=1e-3, atol=1e-3)


def real_size(kind, config, section, folder):
    """transformers' tower of the released 7B, and ours with its weights."""
    with torch.device("meta"):
        public = AutoModel.from_config(getattr(public_config(config, folder), section)).eval()
        ours = kind(config.sam if kind is Sam else config.siglip).eval()
    public.to_empty(device="cpu")
    if kind is Siglip:
        public.embeddings.position_ids.copy_(torch.arange(config.num_image_tokens))
    ours.to_empty(device="cpu")
    make_telling(public)
    own = dict(ours.named_parameters())
    stored = public.state_dict()
    prefix = {"vision_config": "model.vision_model.", "high_res_vision_config": "model.high_res_vision_model."}[section]
    with torch.no_grad():
        for binding in layouts.bindings(config, "transformers"):
            if binding.key.startswith(prefix):
                target = own[binding.parameter.split(".", 2)[2]]
                target = target if binding.rows is None else target[binding.rows]
                target.copy_(stored[binding.key.removeprefix(prefix)].view(target.shape))
    return public, ours


@torch.no_grad()
def test_sam_b_at_its_real_size(tmp_path):
    config = preset("deepseek_vl_7b")
    public, ours = real_size(Sam, config, "high_res_vision_config", tmp_path)
    _, pixels = example_inputs(config, 1)
    expected = public(public_inputs(config, pixels)["high_res_pixel_values"]).last_hidden_state
    ours.skip_neck.load_state_dict(ours.neck.state_dict())
    assert relative_error(ours(pixels, torch.float32)[0], expected) <= 1e-3


@torch.no_grad()
def test_siglip_l_at_its_real_size(tmp_path):
    config = preset("deepseek_vl_7b")
    public, ours = real_size(Siglip, config, "vision_config", tmp_path)
    pixels = torch.rand(1, 3, 384, 384)
    expected = public(public_inputs(config, pixels)["pixel_values"]).last_hidden_state
    assert relative_error(ours(pixels, torch.float32), expected) <= 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_adaptors_of_the_ablation_keep_the_towers_in_halves(kind):
    config = dataclasses.replace(preset("tiny"), adaptor=kind)
    adaptor = make_adaptor(config).eval()
    make_telling(adaptor)
    low, high = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    out = adaptor(low, high)
    assert out.shape == (2, 5, config.language.hidden_size)
    other = adaptor(low, torch.randn_like(high))
    half = config.language.hidden_size // 2
    assert torch.equal(out[..., half:], other[..., half:]) and not torch.equal(out[..., :half], other[..., :half])
    swapped = adaptor(high, low)
    assert torch.equal(torch.cat((swapped[..., half:], swapped[..., :half]), -1), out) == (kind == "shared")


def test_a_shared_adaptor_needs_towers_of_one_width():
    config = dataclasses.replace(preset("tiny"), adaptor="shared")
    config = dataclasses.replace(config, siglip=dataclasses.replace(config.siglip, hidden_size=48))
    with pytest.raises(ValueError, match="SAM's 32 is not SigLIP's 48"):
        DeepSeekVL(config)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "demo", "deepseek_vl_1_3b", "deepseek_vl_1_3b_hybrid", "deepseek_vl_7b"])
def test_sizes_follow_from_the_config(name):
    config: VLConfig = preset(name)
    with torch.device("meta"):
        vision, adaptor = Vision(config), make_adaptor(config)
        pixels = torch.empty(3, 3, config.image_size, config.image_size)
    features = vision.towers(pixels, torch.float32)
    assert isinstance(features, TowerFeatures) and math.isqrt(config.num_image_tokens) == config.siglip.grid
    assert adaptor(*vision(features)).shape == (3, config.num_image_tokens, config.language.hidden_size)
