"""Costs against what torch counts on the model itself, and against what is known of the released models."""

import dataclasses

import pytest
import torch
from checkpoints import CONFIGS
from torch.utils.flop_counter import FlopCounterMode

from vlcore import costs
from vlcore.config import PRESETS, VLConfig, preset
from vlcore.models import DeepSeekVL


def counted(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops()


def meta_model(config):
    with torch.device("meta"):
        return DeepSeekVL(config), torch.empty(1, 3, config.image_size, config.image_size)


def with_whole_windows(config: VLConfig) -> VLConfig:
    """Padded queries are not counted, but the reference computes them: choose windows that tile the grid."""
    window = next(size for size in (4, 5, 6, 8) if config.sam.grid % size == 0)
    return dataclasses.replace(config, sam=dataclasses.replace(config.sam, window_size=window))


@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_parameters_are_the_models(name):
    config = CONFIGS.get(name) or preset(name)
    model, _ = meta_model(config)
    parts = {part: sum(p.numel() for p in parameters) for part, parameters in model.parts().items() if parameters}
    parameters = costs.describe(config)["parameters"]
    assert parameters.pop("total") == sum(parts.values()) and parameters == parts


@pytest.mark.parametrize("name", ["tiny", "demo", "shared", "separate", "deepseek_vl_7b"])
def test_flops_of_an_image_are_what_torch_counts(name):
    config = with_whole_windows(CONFIGS.get(name) or preset(name))
    model, pixels = meta_model(config)
    expected = costs.image_flops(config)
    assert counted(model.vision.sam, pixels, torch.float32) == expected["sam"]
    assert counted(model.vision.siglip, pixels, torch.float32) == expected["siglip"]
    features = model.encode_towers(pixels)
    assert counted(model.adapt, features) == expected["adaptor"]


def test_flops_of_siglip_alone_are_what_torch_counts():
    config = preset("deepseek_vl_1_3b")
    model, pixels = meta_model(config)
    assert counted(model.encode_images, pixels) == sum(costs.image_flops(config).values())


@pytest.mark.parametrize("name", ["tiny", "demo", "deepseek_vl_1_3b", "deepseek_vl_7b"])
def test_flops_of_the_language_model_are_what_torch_counts_but_for_the_causal_half(name):
    config = preset(name).language
    model, _ = meta_model(preset(name))
    with torch.device("meta"):
        embeddings, positions = torch.empty(1, 96, config.hidden_size), torch.empty(1, 96, dtype=torch.long)
    pairs_not_needed = 96 * 96 - 96 * 97 // 2
    skipped = config.num_layers * 4 * pairs_not_needed * config.num_heads * config.head_dim
    assert counted(model.language, embeddings, positions) == costs.llama_flops(config, 96) + skipped
    assert counted(model.lm_head, embeddings) == costs.head_flops(config, 96)
    # A token behind others does the work that it would have done among them.
    assert costs.llama_flops(config, 1, 95) == costs.llama_flops(config, 96) - costs.llama_flops(config, 95)


def test_known_costs_of_the_released_models():
    small, large = costs.describe(preset("deepseek_vl_1_3b")), costs.describe(preset("deepseek_vl_7b"))
    assert small["parameters"]["total"] == 1_962_640_384 and large["parameters"]["total"] == 7_331_390_721
    assert small["kv_cache_bytes_per_token"]["bfloat16"] == 192 * 1024
    assert large["kv_cache_bytes_per_token"]["bfloat16"] == 480 * 1024
    assert large["memory_bytes"]["bfloat16"] == 2 * large["parameters"]["total"]
    assert large["flops"]["prefill_tokens"] == 1088
    assert large["flops"]["prefill"] == pytest.approx(13.5e12, rel=1e-3)
    assert small["flops"]["prefill"] == pytest.approx(2.8e12, rel=1e-3)
    assert large["flops"]["decode"] == pytest.approx(13.5e9, rel=2e-3)
    assert small["flops"]["decode"] == pytest.approx(3.1e9, rel=2e-3)
    assert large["flops"]["image"]["siglip"] == pytest.approx(381e9, rel=2e-3)
    # The public SAM-B does 979 GFLOP, 34 of them on positions that it pads and crops.
    assert large["flops"]["image"]["sam"] == pytest.approx((979 - 34) * 1e9, rel=2e-3)


def test_rendered_for_people():
    text = costs.render(costs.describe(preset("deepseek_vl_7b")))
    for expected in (
        "1024² pixels -> 576 tokens",
        "90,458,368",
        "7,331,390,721",
        "381.4 GFLOP",
        "13.66 GiB of weights",
        "480 KiB of KV cache a token",
        "13.5 TFLOP for 1088 tokens",
        "13.52 GFLOP for the token behind them",
    ):
        assert expected in text
    assert costs.render(costs.describe(preset("tiny"))).startswith("image      160² pixels -> 16 tokens")
