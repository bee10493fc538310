"""config.json as DeepSeek published it <-> VLConfig."""

import dataclasses
from typing import Any

from vlcore.config import SamConfig, SiglipConfig, VLConfig
from vlcore.layouts.fields import Fields, Json
from vlcore.layouts.llama_config import llama_from_dict, llama_to_dict

# The last two, the paper's ablations, are names of ours.
PROJECTOR_TYPES = {
    "hybrid": "low_high_hybrid_split_mlp_gelu",
    "mlp_gelu": "mlp_gelu",
    "shared": "low_high_shared_mlp_gelu",
    "separate": "low_high_separate_mlp_gelu",
}

# The towers are named. One of other sizes has its fields written out beside the bare name.
NAMED_TOWERS: dict[str, SiglipConfig | SamConfig] = {
    "siglip_large_patch16_384": SiglipConfig(),
    "sam_b_downsample": SamConfig(),
}


def from_original(fields: Fields) -> VLConfig:
    vision, params = fields.section("vision_config"), fields.section("vision_config").section("params")
    projector = fields.section("aligner_config").section("params")
    projector.require("depth", 2, 2)
    name = projector.get("projector_type", "")
    kinds = {name: kind for kind, name in PROJECTOR_TYPES.items()}
    if name not in kinds:
        raise ValueError(f"{projector.where}: projector_type {name!r} is none of {', '.join(kinds)}.")
    hybrid = vision.raw.get("cls") == "HybridVisionTower"
    low = params.section("low_res_cfg") if hybrid else params
    sam = _named_tower(params.section("high_res_cfg"), SamConfig) if hybrid else None
    siglip = _named_tower(low, SiglipConfig)
    return VLConfig(
        siglip=siglip,
        sam=sam,
        language=llama_from_dict(fields.section("language_config")),
        adaptor=kinds[name],
        image_token_id=fields.get("image_token_id", 100015),
        pad_color=fields.color("pad_color", pad_color(sam or siglip)),
    )


def _named_tower(fields: Fields, kind: type) -> Any:
    name = fields.get("model_name", "")
    known = NAMED_TOWERS.get(name)
    if name != kind.__name__ and not isinstance(known, kind):
        raise ValueError(f"{fields.where}: model_name {name!r} is none of {', '.join(NAMED_TOWERS)}.")
    start = known or kind()
    sizes = {f.name: fields.get(f.name, getattr(start, f.name)) for f in dataclasses.fields(kind)}
    fields.require("select_feature", "same", "same")
    fields.require("select_layer", -1, -1)
    mean, std = fields.color("pixel_mean", start.mean), fields.color("pixel_std", start.std)
    return kind(**sizes | {"mean": mean, "std": std})


def to_original(config: VLConfig) -> Json:
    low = _tower_params(config.siglip)
    vision: Json = {"cls": "CLIPVisionTower", "model_type": "vision", "params": low}
    if config.sam:
        params = {"concat_type": "tuple", "high_res_cfg": _tower_params(config.sam), "low_res_cfg": low}
        vision |= {"cls": "HybridVisionTower", "params": params}
    aligner = {
        "depth": 2,
        "input_dim": config.siglip.hidden_size,
        "n_embed": config.language.hidden_size,
        "projector_type": PROJECTOR_TYPES[config.adaptor],
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "language_config": llama_to_dict(config.language),
        "vision_config": vision,
    }


def _tower_params(tower: SiglipConfig | SamConfig) -> Json:
    params = {"pixel_mean": list(tower.mean), "pixel_std": list(tower.std), "image_size": tower.image_size}
    params |= {"select_feature": "same", "select_layer": -1}
    for name, known in NAMED_TOWERS.items():
        if dataclasses.replace(tower, mean=known.mean, std=known.std) == known:
            return params | {"model_name": name}
    sizes = {name: value for name, value in dataclasses.asdict(tower).items() if name not in ("mean", "std")}
    return params | {"model_name": type(tower).__name__} | sizes


def pad_color(tower: SiglipConfig | SamConfig) -> tuple[int, ...]:
    """The public code pads with the mean colour of the tower that sees the padded image, truncated to integers."""
    return tuple(int(channel * 255) for channel in tower.mean)
