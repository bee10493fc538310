"""What a config refuses, before a model of it is made."""

import dataclasses
import math

import pytest

from vlcore.config import preset

TINY = preset("tiny")


def language(**changes):
    return dataclasses.replace(TINY.language, **changes)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("siglip", {"image_size": 0}, "SiglipConfig: image_size 0 needs to be positive and finite"),
        ("siglip", {"num_heads": 0}, "SiglipConfig: num_heads 0 needs to be positive"),
        ("siglip", {"num_layers": -1}, "SiglipConfig: num_layers -1 needs to be positive"),
        ("siglip", {"layer_norm_eps": 0.0}, "SiglipConfig: layer_norm_eps 0.0 needs to be positive"),
        ("siglip", {"std": (0.5, 0.0, 0.5)}, r"SiglipConfig: std \(0.5, 0.0, 0.5\) needs to be positive"),
        ("siglip", {"patch_size": 5}, "SiglipConfig: patch_size 5 does not divide image_size 64"),
        ("sam", {"window_size": 0}, "SamConfig: window_size 0 needs to be positive"),
        ("sam", {"neck_channels": 0}, "SamConfig: neck_channels 0 needs to be positive"),
        ("sam", {"std": (math.nan, 1.0, 1.0)}, r"SamConfig: std \(nan, 1.0, 1.0\) needs to be positive and finite"),
        ("sam", {"global_layers": ()}, r"SamConfig: global_layers \(\) must name layers of 0..3"),
        ("language", {"vocab_size": 0}, "LlamaConfig: vocab_size 0 needs to be positive"),
        ("language", {"rope_theta": math.inf}, "LlamaConfig: rope_theta inf needs to be positive and finite"),
        ("language", {"rms_norm_eps": math.nan}, "LlamaConfig: rms_norm_eps nan needs to be positive and finite"),
        ("language", {"max_positions": 0}, "LlamaConfig: max_positions 0 needs to be positive"),
        ("language", {"head_dim": 15}, "LlamaConfig: head_dim 15 is odd"),
        ("language", {"bos_token_id": -1}, "LlamaConfig: bos_token_id -1 is not in a vocabulary of 512"),
        ("language", {"eos_token_id": 512}, "LlamaConfig: eos_token_id 512 is not in a vocabulary of 512"),
        ("language", {"pad_token_id": 600}, "LlamaConfig: pad_token_id 600 is not in a vocabulary of 512"),
        ("language", {"other_eos_token_ids": (7, 512)}, r"LlamaConfig: other_eos_token_ids \(7, 512\) is not in a"),
    ],
)
def test_a_part_refuses_what_cannot_work(part, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(getattr(TINY, part), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_color": (0, 256, 0)}, r"pad_color \(0, 256, 0\) is not RGB in 0..255"),
        ({"pad_color": (0, -1, 0)}, r"pad_color \(0, -1, 0\) is not RGB in 0..255"),
        ({"pad_color": (0, 0)}, r"pad_color \(0, 0\) is not RGB in 0..255"),
        ({"image_token_id": 512}, "image_token_id 512 is not in a vocabulary of 512"),
        ({"language": language(hidden_size=65)}, "hidden_size 65 is odd; adaptor 'hybrid' gives each tower half"),
        ({"adaptor": "mlp"}, "adaptor 'mlp' is none of"),
        ({"adaptor": "mlp_gelu"}, "adaptor 'mlp_gelu' does not fit two towers"),
        ({"sam": None}, "adaptor 'hybrid' does not fit SigLIP alone"),
    ],
)
def test_a_model_refuses_what_does_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=f"^VLConfig: .*{message}"):
        dataclasses.replace(TINY, **changes)


def test_one_tower_may_have_an_odd_width():
    alone = dataclasses.replace(TINY, sam=None, adaptor="mlp_gelu", language=language(hidden_size=65))
    assert alone.language.hidden_size == 65
