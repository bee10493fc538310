"""Checkpoints that are not what they claim: each error names the file or the key."""

import json
import re

import pytest
import torch
from checkpoints import assert_same, rewrite, telling_model
from safetensors.torch import save_file

from vlcore.checkpoint import from_pretrained, save_pretrained
from vlcore.config import preset
from vlcore.layouts import files


@pytest.fixture
def model():
    return telling_model(preset("tiny"))


@pytest.fixture
def saved(model, tmp_path):
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def test_every_missing_unexpected_and_misshapen_key_is_named(saved):
    def damage(tensors):
        del tensors["model.language_model.norm.weight"], tensors["model.high_res_vision_alpha"]
        tensors["model.language_model.layers.9.norm.weight"] = torch.zeros(3)
        tensors["model.aligner.proj.bias"] = torch.zeros(7)

    rewrite(saved / "model.safetensors", damage)
    with pytest.raises(ValueError) as caught:
        from_pretrained(saved)
    message = str(caught.value)
    assert str(saved) in message
    assert re.search(r"2 missing: (model\.high_res_vision_alpha, )model\.language_model\.norm\.weight;", message)
    assert "1 unexpected: model.language_model.layers.9.norm.weight;" in message
    assert "1 of another shape: model.aligner.proj.bias is [7], not [64]" in message


def test_a_long_list_of_keys_is_counted(saved):
    rewrite(saved / "model.safetensors", lambda t: [t.pop(key) for key in list(t) if "high_res_vision_model" in key])
    with pytest.raises(ValueError, match=r"65 missing: (\S+, ){10}and 55 more\."):
        from_pretrained(saved)


def test_a_config_of_another_model_does_not_fit(saved):
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 176
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"6 of another shape: .*gate_proj\.weight is \[160, 64\], not \[176, 64\]"):
        from_pretrained(saved)


@pytest.mark.parametrize("part", ["text_config", "vision_config", "high_res_vision_config"])
def test_more_layers_than_tensors_are_refused_before_they_are_listed(saved, part):
    config = json.loads((saved / "config.json").read_text())
    config[part]["num_hidden_layers"] = 10**12
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json describes 1\d+ layers, and there are \d+ tensors in all"):
        from_pretrained(saved)


def test_a_dtype_may_be_named(saved):
    assert from_pretrained(saved, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16
    for dtype in (torch.int8, "int8", "half precision", 16):
        with pytest.raises(ValueError, match=f"from_pretrained: dtype {dtype!r} is none of float64, float32, float16"):
            from_pretrained(saved, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "there is no vision_config, which a 'deepseek_vl_hybrid' is made of"),
        ({"text_config": None, "vision_config": None}, "no text_config and no vision_config, which"),
        ({"vision_config": []}, r"vision_config is \[\]; it should be an object"),
        ({"vision_config": {"hidden_size": 64}}, "hidden_act is left out, which stands for 'gelu_pytorch_tanh'; this"),
        (
            {"text_config": {"hidden_act": "relu"}},
            "text_config: hidden_act is 'relu'; this package computes 'silu' only",
        ),
    ],
)
def test_a_part_that_is_missing_or_another_is_named(saved, changes, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        from_pretrained(saved)


def test_quantised_weights_are_refused(saved):
    rewrite(saved / "model.safetensors", lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    with pytest.raises(ValueError, match="1 of a dtype that is none of F64, F32, F16, BF16: lm_head.weight is I8"):
        from_pretrained(saved)


def test_a_weight_under_both_names_of_the_low_tower_is_not_dropped(saved):
    doubled = "model.vision_model.vision_model.post_layernorm.bias"
    rewrite(saved / "model.safetensors", lambda tensors: tensors.update({doubled: torch.zeros(32)}))
    with pytest.raises(ValueError, match=r"hold model\.vision_model\.post_layernorm\.bias twice"):
        from_pretrained(saved)


def test_layouts_do_not_mix(saved):
    rewrite(saved / "model.safetensors", lambda tensors: tensors.update({"aligner.layers.1.bias": torch.zeros(64)}))
    with pytest.raises(ValueError, match="of both layouts at once"):
        from_pretrained(saved)
    save_file({"encoder.weight": torch.zeros(3)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="of no known layout; the first key is 'encoder.weight'"):
        from_pretrained(saved)


class TestFiles:
    def test_no_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no directory .*absent"):
            from_pretrained(tmp_path / "absent")

    def test_no_config(self, saved):
        (saved / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match="config.json"):
            from_pretrained(saved)

    def test_no_weights(self, saved):
        (saved / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="holds no weights: neither model.safetensors nor"):
            from_pretrained(saved)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
    def test_pickles_are_never_opened(self, saved, name):
        (saved / "model.safetensors").rename(saved / name)
        with pytest.raises(ValueError, match=rf"holds pickled weights only \({re.escape(name)}\), which can run code"):
            from_pretrained(saved)

    def test_one_file_of_another_name_will_do_and_several_will_not(self, saved, model):
        (saved / "model.safetensors").rename(saved / "weights.safetensors")
        assert_same(from_pretrained(saved), model)
        (saved / "more.safetensors").write_bytes((saved / "weights.safetensors").read_bytes())
        with pytest.raises(ValueError, match="holds 2 safetensors files and no model.safetensors.index.json"):
            from_pretrained(saved)

    @pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 9])
    def test_a_bogus_header(self, saved, content):
        (saved / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
            from_pretrained(saved)

    def test_a_truncated_file(self, saved):
        content = (saved / "model.safetensors").read_bytes()
        (saved / "model.safetensors").write_bytes(content[:-100])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
            from_pretrained(saved)


class TestIndex:
    @pytest.fixture
    def sharded(self, model, tmp_path):
        save_pretrained(model, tmp_path / "model", max_shard_size=300_000)
        return tmp_path / "model"

    def change(self, directory, change):
        index = json.loads((directory / files.INDEX).read_text())
        change(index)
        (directory / files.INDEX).write_text(json.dumps(index))

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", ""])
    def test_leads_out_of_the_directory(self, sharded, name):
        save_file({"lm_head.weight": torch.zeros(512, 64)}, sharded.parent / "secret.safetensors")
        self.change(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
        with pytest.raises(ValueError, match="puts 'lm_head.weight' into .*, which is no file name in its directory"):
            from_pretrained(sharded)

    def test_names_a_missing_shard(self, sharded):
        self.change(sharded, lambda index: index["weight_map"].update({"lm_head.weight": "model-9.safetensors"}))
        with pytest.raises(ValueError, match="'lm_head.weight' into 'model-9.safetensors', but there is no such file"):
            from_pretrained(sharded)

    def test_disagrees_with_a_shard(self, sharded):
        key = "model.high_res_vision_alpha"
        name = json.loads((sharded / files.INDEX).read_text())["weight_map"][key]
        self.change(sharded, lambda index: index["weight_map"].pop(key))
        with pytest.raises(ValueError, match=f"disagree: the file holds, unnamed by it, '{key}'"):
            from_pretrained(sharded)
        self.change(sharded, lambda index: index["weight_map"].update({key: name, "model.more": name}))
        with pytest.raises(ValueError, match="disagree: the file lacks 'model.more'"):
            from_pretrained(sharded)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
    def test_is_malformed(self, sharded, content):
        (sharded / files.INDEX).write_text(content)
        with pytest.raises(ValueError, match=r"index\.json (is not JSON|holds a JSON list|has no weight_map)"):
            from_pretrained(sharded)
