"""Models that checkpoints are tested with, and how to look into and to damage what was written."""

import dataclasses

import torch
from public_models import make_telling
from safetensors.torch import load_file, save_file

from vlcore.config import preset
from vlcore.models import DeepSeekVL


def tied(config):
    return dataclasses.replace(config, language=dataclasses.replace(config.language, tie_embeddings=True))


def siglip_only(config):
    return dataclasses.replace(config, sam=None, adaptor="mlp_gelu", pad_color=(127, 127, 127))


CONFIGS = {
    "tiny": preset("tiny"),
    "demo": preset("demo"),
    "siglip_only": siglip_only(preset("tiny")),
    "tied": tied(preset("tiny")),
    "shared": dataclasses.replace(preset("tiny"), adaptor="shared"),
    "separate": dataclasses.replace(preset("tiny"), adaptor="separate"),
}


def telling_model(config):
    model = DeepSeekVL(config).eval()
    make_telling(model)
    return model


def assert_same(actual, expected):
    assert actual.config == expected.config
    state = actual.state_dict()
    for key, tensor in expected.state_dict().items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key


def rewrite(file, change):
    """Apply `change` to the dict of tensors in a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
