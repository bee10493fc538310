"""The tables of weights and config.json in both layouts, against what DeepSeek published."""

import dataclasses
import hashlib
import json
import math

import pytest
import torch
from checkpoints import CONFIGS

from vlcore import layouts
from vlcore.config import PRESETS, preset
from vlcore.models import DeepSeekVL

# The released checkpoints' tables: tensors, parameters, and the SHA-256 of
# json.dumps({key: shape, ...}, separators=(",", ":")) in the order in which they are stored.
RELEASED = {
    "deepseek_vl_1_3b": (529, 1975235584, "28e1788b31b9e10705822fa36cf83f7d31ebc77ea94a5ffadb88d392568edef0"),
    "deepseek_vl_7b": (775, 7343990017, "aa0f5aaa7e590b45734c6aa1c6f892d2f69deff35dad16411b2e0b4f182c53f7"),
}

# config.json as published, without the fields that say nothing about the model.
SIGLIP_PARAMS = {
    "image_size": 384,
    "model_name": "siglip_large_patch16_384",
    "pixel_mean": [0.5, 0.5, 0.5],
    "pixel_std": [0.5, 0.5, 0.5],
    "select_feature": "same",
    "select_layer": -1,
}
SAM_PARAMS = {
    "image_size": 1024,
    "model_name": "sam_b_downsample",
    "pixel_mean": [0.48145466, 0.4578275, 0.40821073],
    "pixel_std": [0.26862954, 0.26130258, 0.27577711],
    "select_feature": "same",
    "select_layer": -1,
}
PUBLISHED = {
    "deepseek_vl_1_3b": {
        "model_type": "multi_modality",
        "aligner_config": {"params": {"depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu"}},
        "language_config": {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 16384,
            "model_type": "llama",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "vocab_size": 102400,
        },
        "vision_config": {"cls": "CLIPVisionTower", "params": SIGLIP_PARAMS},
    },
    "deepseek_vl_7b": {
        "model_type": "multi_modality",
        "aligner_config": {"params": {"depth": 2, "projector_type": "low_high_hybrid_split_mlp_gelu"}},
        "language_config": {
            "max_position_embeddings": 16384,
            "model_type": "llama",
            "num_hidden_layers": 30,
            "vocab_size": 102400,
        },
        "vision_config": {
            "cls": "HybridVisionTower",
            "params": {"concat_type": "tuple", "high_res_cfg": SAM_PARAMS, "low_res_cfg": SIGLIP_PARAMS},
        },
    },
}


def through_json(value):
    return json.loads(json.dumps(value))


def transformers_config(**changes):
    return through_json(layouts.config_to_dict(preset("tiny"), "transformers")) | changes


def changed(section, **changes):
    config = transformers_config()
    config[section] |= changes
    return config


@pytest.mark.parametrize("name", RELEASED)
def test_the_original_table_is_the_released_one(name):
    table = layouts.weight_table(preset(name), "original")
    text = json.dumps(table, separators=(",", ":"))
    count = sum(math.prod(shape) for shape in table.values())
    assert (len(table), count, hashlib.sha256(text.encode()).hexdigest()) == RELEASED[name]


def test_spot_keys_of_both_tables():
    original = layouts.weight_table(preset("deepseek_vl_7b"), "original")
    high, low = "vision_model.vision_tower_high.vision_tower", "vision_model.vision_tower_low.vision_tower"
    assert original[f"{high}.pos_embed"] == (1, 64, 64, 768)
    assert original[f"{high}.blocks.2.attn.rel_pos_h"] == (127, 64)
    assert original[f"{high}.blocks.3.attn.rel_pos_h"] == (27, 64)
    assert original[f"{high}.neck_hd.2.weight"] == (256, 256, 3, 3)
    assert original[f"{high}.hd_alpha_downsamples"] == (1,)
    assert original[f"{low}.attn_pool.latent"] == (1, 1, 1024)
    assert original["vision_model.high_layer_norm.weight"] == (1024,)
    assert original["aligner.layers.1.weight"] == (4096, 4096)
    transformers = layouts.weight_table(preset("deepseek_vl_7b"), "transformers")
    assert transformers["model.vision_model.embeddings.position_embedding.weight"] == (576, 1024)
    assert transformers["model.vision_model.encoder.layers.23.self_attn.k_proj.weight"] == (1024, 1024)
    assert transformers["model.high_res_vision_neck.layer_norm2.bias"] == (256,)
    assert transformers["lm_head.weight"] == (102400, 4096)


@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_the_tables_cover_every_parameter_of_the_model_once(name):
    config = CONFIGS.get(name) or preset(name)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in DeepSeekVL(config).named_parameters()}
    assert {name: shape for name, shape in layouts.parameters(config) if not name.startswith("(unused)")} == shapes
    for layout in layouts.LAYOUTS:
        table = layouts.bindings(config, layout)
        assert len({binding.key for binding in table}) == len(table)
        assert {layouts.detect_layout(binding.key) for binding in table} == {layout}
        sizes = dict.fromkeys(shapes, 0)
        for binding in table:
            if binding.parameter is not None:
                sizes[binding.parameter] += math.prod(binding.shape)
        assert sizes == {name: math.prod(shape) for name, shape in shapes.items()}


def test_there_are_two_layouts():
    for function in (layouts.weight_table, layouts.config_to_dict):
        with pytest.raises(ValueError, match="no layout 'vllm'; there are original, transformers"):
            function(preset("tiny"), "vllm")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_filled_in(name):
    assert layouts.config_from_dict(PUBLISHED[name]) == preset(name)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_a_config_comes_back_as_it_was_written(name, layout):
    config = CONFIGS.get(name) or preset(name)
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, rope_theta=5e5))
    assert layouts.config_from_dict(through_json(layouts.config_to_dict(config, layout))) == config


def test_the_original_layout_names_the_towers_that_it_knows():
    params = layouts.config_to_dict(preset("deepseek_vl_7b"), "original")["vision_config"]["params"]
    assert through_json(params["high_res_cfg"]) == SAM_PARAMS and through_json(params["low_res_cfg"]) == SIGLIP_PARAMS


def test_what_a_transformers_config_leaves_out_has_its_classes_defaults():
    raw = {
        "model_type": "deepseek_vl_hybrid",
        "text_config": {"vocab_size": 102400, "num_hidden_layers": 30, "max_position_embeddings": 16384},
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 384,
        },
        "tie_word_embeddings": False,
    }
    assert layouts.config_from_dict(raw) == preset("deepseek_vl_7b")
    raw["high_res_vision_config"] = {"hidden_size": 384, "num_attention_heads": 6}
    assert layouts.config_from_dict(raw).sam.intermediate_size == 1536


def test_bos_and_eos_1_and_2_are_wrong_with_deepseeks_vocabulary_only():
    config = transformers_config()
    config["text_config"] |= {"vocab_size": 102400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    language = layouts.config_from_dict(config).language
    assert (language.bos_token_id, language.eos_token_id, language.pad_token_id) == (100000, 100001, 100001)
    config["text_config"] |= {"vocab_size": 4096, "eos_token_id": [7, 8]}
    language = layouts.config_from_dict(config).language
    assert (language.bos_token_id, language.eos_token_id, language.pad_token_id) == (1, 7, 7)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_all_the_ids_that_end_an_answer_are_read_and_written(layout, tmp_path):
    config = preset("tiny")
    several = dataclasses.replace(config, language=dataclasses.replace(config.language, other_eos_token_ids=(7, 8)))
    raw = layouts.config_to_dict(several, layout)
    assert layouts.config_from_dict(raw) == several
    text = raw["text_config" if layout == "transformers" else "language_config"]
    assert text["eos_token_id"] == [2, 7, 8]
    text["eos_token_id"] = [2, 7]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for ends, others in [(None, (7,)), (2, (7,)), (8, (7, 8)), ([8, 2, 7], (7, 8))]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": ends}))
        assert layouts.read_config(tmp_path).language.other_eos_token_ids == others
    for ends, message in [("end", "eos_token_id is 'end'; it should be int"), (512, r"other_eos_token_ids \(7, 512\)")]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        with pytest.raises(ValueError, match=f"generation_config.json: .*{message}"):
            layouts.read_config(tmp_path)


def test_a_generation_config_does_not_bring_back_the_wrong_ids_of_deepseeks_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["deepseek_vl_1_3b"]))
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    assert layouts.read_config(tmp_path) == preset("deepseek_vl_1_3b")


def test_older_fields_of_transformers_are_understood():
    config = transformers_config()
    del config["text_config"]["rope_parameters"], config["text_config"]["head_dim"]
    config["text_config"] |= {"rope_theta": 5e4, "rope_scaling": None}
    config["vision_config"]["image_size"] = [64, 64]
    read = layouts.config_from_dict(config)
    assert read.language.rope_theta == 5e4 and read.language.head_dim == 16 and read.siglip.image_size == 64


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "llava"}, r"config.json: model_type 'llava' is no DeepSeek-VL"),
        ({"model_type": "deepseek_vl_v2"}, "model_type 'deepseek_vl_v2' is no DeepSeek-VL"),
        (changed("text_config", hidden_act="gelu"), "text_config: hidden_act is 'gelu'; .* 'silu' only"),
        (changed("text_config", attention_bias=True), "attention_bias is True; this package computes False only"),
        (changed("text_config", rope_parameters={"rope_type": "yarn"}), "rope_parameters asks for 'yarn'"),
        (
            changed("text_config", model_type="qwen2"),
            "text_config: model_type is 'qwen2'; this package computes 'llama'",
        ),
        (
            changed("text_config", partial_rotary_factor=0.5),
            "partial_rotary_factor is 0.5; this package computes 1 only",
        ),
        (
            changed("text_config", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "rope_parameters: partial_rotary_factor is 0.5",
        ),
        (changed("text_config", eos_token_id=["a"]), "eos_token_id is 'a'; it should be int"),
        (changed("text_config", eos_token_id=[]), r"eos_token_id is \[\]; it should be int"),
        (changed("text_config", hidden_size="64"), "hidden_size is '64'; it should be int such as 4096"),
        (changed("text_config", num_hidden_layers=-1), "num_hidden_layers is -1"),
        (changed("text_config", num_key_value_heads=3), "num_kv_heads 3 does not divide num_heads 4"),
        (changed("vision_config", hidden_act="gelu_pytorch_tanh"), "vision_config: hidden_act is 'gelu_pytorch_tanh'"),
        (changed("vision_config", image_size=[64, 32]), r"image_size is \[64, 32\]"),
        (changed("vision_config", pixel_mean=[0.5]), "pixel_mean is .* three numbers, one a channel"),
        (changed("high_res_vision_config", use_rel_pos=False), "use_rel_pos is False; this package computes True only"),
        (
            changed("high_res_vision_config", global_attn_indexes=[9]),
            r"global_layers \(9,\) must name layers of 0\.\.3",
        ),
        (transformers_config(text_config=7), "text_config is 7; it should be an object"),
        (transformers_config(image_token_id=512), "image_token_id 512 is "),
        (PUBLISHED["deepseek_vl_7b"] | {"aligner_config": {}}, "projector_type '' is none of low_high_hybrid_split"),
        (
            PUBLISHED["deepseek_vl_1_3b"] | {"vision_config": {"params": {"model_name": "eva_clip"}}},
            "model_name 'eva_clip' is none of siglip_large_patch16_384, sam_b_downsample",
        ),
    ],
)
def test_says_what_it_cannot_compute(config, message):
    with pytest.raises(ValueError, match=f"^config.json: .*{message}|^{message}"):
        layouts.config_from_dict(config)


def test_an_implied_tanh_gelu_is_refused_as_an_explicit_one():
    config = transformers_config()
    del config["vision_config"]["hidden_act"]
    implied = "hidden_act is left out, which stands for 'gelu_pytorch_tanh'; this package computes 'gelu' only"
    with pytest.raises(ValueError, match=implied):
        layouts.config_from_dict(config)


def test_fields_that_are_null_have_their_default():
    config = changed("text_config", partial_rotary_factor=None, model_type=None)
    assert layouts.config_from_dict(config) == layouts.config_from_dict(
        changed("text_config", partial_rotary_factor=1.0)
    )


@pytest.mark.parametrize(
    "content, message",
    [("{", "is not JSON"), ("[" * 100_000, "is not JSON: maximum recursion"), ("[1]", "holds a JSON list, not an obj")],
    ids=["broken", "deep", "list"],
)
def test_config_json_is_an_object(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        layouts.read_config(tmp_path)


def test_a_config_without_weights_can_be_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["deepseek_vl_7b"]))
    assert layouts.read_config(str(tmp_path)) == preset("deepseek_vl_7b")
