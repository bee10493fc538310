"""transformers' DeepSeek-VL with random weights, to compare ours with."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto import AutoConfig

from vlcore import layouts
from vlcore.config import CLIP_MEAN, CLIP_STD, VLConfig
from vlcore.models import DeepSeekVL

ALPHA = 0.37  # at its initial value of 0, half of the hybrid encoder would go untested


def public_config(config: VLConfig, folder: Path):
    """transformers' own reading of the config.json that we write."""
    (folder / "config.json").write_text(json.dumps(layouts.config_to_dict(config, "transformers")))
    return AutoConfig.from_pretrained(folder)


def public_model(config: VLConfig, folder: Path, seed: int = 0) -> nn.Module:
    """transformers' model of `config`, in eval mode, with telling weights."""
    model = AutoModelForImageTextToText.from_config(public_config(config, folder)).eval()
    make_telling(model, seed)
    return model


@torch.no_grad()
def make_telling(model: nn.Module, seed: int = 0) -> None:
    """Random weights at a scale at which attention is far from uniform and no bias or gain is without effect."""
    # The generators of whatever devices the weights are on, as they were afterwards.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _randomize(model)


def _randomize(model: nn.Module) -> None:
    tied = "lm_head.weight" not in dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        mean, std = 0.0, 0.2
        if name.endswith("alpha"):
            mean, std = ALPHA, 0.0
        elif tied and name.endswith("language_model.norm.weight"):
            std = 1.0  # of both signs, or a tied head would repeat the last token for ever
        elif parameter.ndim == 1:
            mean = float("norm" in name and name.endswith("weight"))
        elif "embed_tokens" in name:
            # Loud enough that not every token says what the many image tokens say; a tied head has them for rows.
            std = 0.5 if tied else 3.0
        elif "pos" in name:
            std = 0.5
        else:
            # The language model's sublayers speak up, or the last token alone would choose the next.
            std = (2.0 if "language" in name else 1.2) * parameter[0].numel() ** -0.5
        parameter.normal_(mean, std)


@torch.no_grad()
def copy_weights(source: nn.Module, model: DeepSeekVL) -> None:
    """Give `model` the weights of transformers' model of the same config."""
    stored, parameters = source.state_dict(), dict(model.named_parameters())
    for binding in layouts.bindings(model.config, "transformers"):
        assert binding.parameter  # every tensor of this layout is applied
        whole = parameters[binding.parameter]
        target = whole if binding.rows is None else whole[binding.rows]
        target.copy_(stored[binding.key].view(target.shape))


def public_inputs(config: VLConfig, pixels: Tensor) -> dict[str, Tensor]:
    """What transformers' model takes for pixels in [0, 1]: each tower's own size and normalisation."""
    side = config.siglip.image_size
    low = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    inputs = {"pixel_values": (low - 0.5) / 0.5}
    if config.sam:
        mean, std = (pixels.new_tensor(channels).view(3, 1, 1) for channels in (CLIP_MEAN, CLIP_STD))
        inputs["high_res_pixel_values"] = (pixels - mean) / std
    return inputs


def example_inputs(config: VLConfig, num_images: int = 2, num_text: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids (1, T) with text around each image's placeholders, and pixels (num_images, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    first_text_id = max(config.image_token_id, 2) + 1
    pieces = []
    for _ in range(num_images):
        pieces.append(torch.randint(first_text_id, config.language.vocab_size, (num_text,), generator=generator))
        pieces.append(torch.full((config.num_image_tokens,), config.image_token_id))
    pieces.append(torch.randint(first_text_id, config.language.vocab_size, (num_text,), generator=generator))
    pixels = torch.rand(num_images, 3, config.image_size, config.image_size, generator=generator)
    return torch.cat(pieces)[None], pixels
