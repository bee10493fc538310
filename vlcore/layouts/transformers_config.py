"""config.json as transformers writes it for deepseek_vl and deepseek_vl_hybrid <-> VLConfig.

What a file leaves out has the default of the class that wrote it: SiglipVisionConfig, SamVisionConfig, LlamaConfig.
"""

import dataclasses

from vlcore.config import CLIP_MEAN, CLIP_STD, HALF, SamConfig, SiglipConfig, VLConfig
from vlcore.layouts.fields import Fields, Json
from vlcore.layouts.llama_config import llama_from_dict, llama_to_dict
from vlcore.layouts.original_config import pad_color

# The last two, the paper's ablations, are names of ours: transformers has no such models, and refuses them as unknown.
MODEL_TYPES = {
    "hybrid": "deepseek_vl_hybrid",
    "mlp_gelu": "deepseek_vl",
    "shared": "deepseek_vl_hybrid_shared",
    "separate": "deepseek_vl_hybrid_separate",
}
ARCHITECTURES = {"hybrid": "DeepseekVLHybridForConditionalGeneration", "mlp_gelu": "DeepseekVLForConditionalGeneration"}


def from_transformers(fields: Fields) -> VLConfig:
    kinds = {name: kind for kind, name in MODEL_TYPES.items()}
    adaptor = kinds[fields.raw["model_type"]]
    # Of these not all that is left out would fit; of high_res_vision_config it does.
    if missing := [part for part in ("text_config", "vision_config") if fields.raw.get(part) is None]:
        given = fields.raw["model_type"]
        raise ValueError(f"{fields.where}: there is no {' and no '.join(missing)}, which a {given!r} is made of.")
    text = fields.section("text_config")
    siglip = _siglip_from_dict(fields.section("vision_config"))
    sam = None if adaptor == "mlp_gelu" else _sam_from_dict(fields.section("high_res_vision_config"))
    tied = fields.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return VLConfig(
        siglip=siglip,
        sam=sam,
        language=dataclasses.replace(llama_from_dict(text), tie_embeddings=tied),
        adaptor=adaptor,
        image_token_id=fields.get("image_token_id", 100015),
        pad_color=fields.color("pad_color", pad_color(sam or siglip)),
    )


def _siglip_from_dict(fields: Fields) -> SiglipConfig:
    fields.require("model_type", "siglip_vision_model", "siglip_vision_model")
    fields.require("num_channels", 3, 3)
    fields.require("hidden_act", "gelu", "gelu_pytorch_tanh")
    return SiglipConfig(
        image_size=fields.side("image_size", 224),
        patch_size=fields.side("patch_size", 16),
        hidden_size=fields.get("hidden_size", 768),
        intermediate_size=fields.get("intermediate_size", 3072),
        num_layers=fields.get("num_hidden_layers", 12),
        num_heads=fields.get("num_attention_heads", 12),
        layer_norm_eps=fields.get("layer_norm_eps", 1e-6),
        mean=fields.color("pixel_mean", HALF),
        std=fields.color("pixel_std", HALF),
    )


def _sam_from_dict(fields: Fields) -> SamConfig:
    fields.require("model_type", "sam_vision_model", "sam_vision_model")
    fields.require("num_channels", 3, 3)
    fields.require("hidden_act", "gelu", "gelu")
    for name in ("qkv_bias", "use_abs_pos", "use_rel_pos"):
        fields.require(name, True, True)
    hidden_size = fields.get("hidden_size", 768)
    return SamConfig(
        image_size=fields.side("image_size", 1024),
        patch_size=fields.side("patch_size", 16),
        hidden_size=hidden_size,
        intermediate_size=fields.get("mlp_dim", int(hidden_size * fields.get("mlp_ratio", 4.0))),
        num_layers=fields.get("num_hidden_layers", 12),
        num_heads=fields.get("num_attention_heads", 12),
        window_size=fields.get("window_size", 14),
        global_layers=fields.get("global_attn_indexes", (2, 5, 8, 11)),
        neck_channels=fields.get("output_channels", 256),
        layer_norm_eps=fields.get("layer_norm_eps", 1e-6),
        mean=fields.color("pixel_mean", CLIP_MEAN),
        std=fields.color("pixel_std", CLIP_STD),
    )


def to_transformers(config: VLConfig) -> Json:
    siglip = _vit_to_dict(config.siglip) | {
        "model_type": "siglip_vision_model",
        "intermediate_size": config.siglip.intermediate_size,
        "vision_use_head": False,
    }
    raw: Json = {
        "architectures": [ARCHITECTURES.get(config.adaptor, "DeepSeekVL")],
        "model_type": MODEL_TYPES[config.adaptor],
        "text_config": llama_to_dict(config.language),
        "vision_config": siglip,
        "tie_word_embeddings": config.language.tie_embeddings,
    }
    if config.sam:
        raw["high_res_vision_config"] = _vit_to_dict(config.sam) | {
            "model_type": "sam_vision_model",
            "mlp_dim": config.sam.intermediate_size,
            "window_size": config.sam.window_size,
            "global_attn_indexes": list(config.sam.global_layers),
            "output_channels": config.sam.neck_channels,
        }
    return raw


def _vit_to_dict(tower: SiglipConfig | SamConfig) -> Json:
    return {
        "hidden_act": "gelu",
        "hidden_size": tower.hidden_size,
        "image_size": tower.image_size,
        "layer_norm_eps": tower.layer_norm_eps,
        "num_attention_heads": tower.num_heads,
        "num_channels": 3,
        "num_hidden_layers": tower.num_layers,
        "patch_size": tower.patch_size,
        "pixel_mean": list(tower.mean),
        "pixel_std": list(tower.std),
    }
