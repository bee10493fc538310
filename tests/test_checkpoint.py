"""Weights on disk and back: both layouts, one file and several, ours and transformers', and plain LLaMA."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIGS, assert_same, rewrite, siglip_only, telling_model, tied
from public_models import ALPHA, copy_weights, example_inputs, public_inputs, public_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlcore import layouts
from vlcore.checkpoint import from_pretrained, load_llama, save_pretrained
from vlcore.config import preset
from vlcore.layouts import files
from vlcore.models import DeepSeekVL


@pytest.fixture
def model():
    return telling_model(preset("tiny"))


@pytest.fixture
def saved(model, tmp_path):
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("shard_size", [5e9, 1e5])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name, layout, shard_size, tmp_path):
    model = telling_model(CONFIGS[name])
    save_pretrained(model, tmp_path, layout=layout, max_shard_size=shard_size)
    assert_same(from_pretrained(tmp_path), model)
    written = set(json.loads((tmp_path / files.INDEX).read_text())["weight_map"]) if shard_size == 1e5 else None
    written = written or set(load_file(tmp_path / "model.safetensors"))
    table = layouts.weight_table(model.config, layout)
    assert written == {key for key in table if "attn_pool" not in key and not re.search("(high|low)_layer_norm", key)}


def test_shards_are_as_transformers_writes_them(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_size=300_000)
    index = json.loads((tmp_path / files.INDEX).read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert [shard.name for shard in shards] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            keys = set(opened.keys())
            assert keys == {key for key, name in index["weight_map"].items() if name == shard.name}
            assert sum(opened.get_tensor(key).nbytes for key in keys) <= 300_000 or len(keys) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "demo", "siglip_only", "tied"])
def test_transformers_reads_what_we_write(name, tmp_path):
    model = telling_model(CONFIGS[name])
    save_pretrained(model, tmp_path, max_shard_size=1e6)
    public, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    ids, pixels = example_inputs(model.config)
    expected = public.eval()(input_ids=ids, **public_inputs(model.config, pixels)).logits
    assert (model(ids, pixels).logits - expected).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("name", ["tiny", "siglip_only", "tied"])
def test_we_read_what_transformers_writes(name, doubled, tmp_path):
    public = public_model(CONFIGS[name], tmp_path)
    public.save_pretrained(tmp_path, max_shard_size=100_000 if doubled else "1GB")
    if doubled:  # as its releases 4 did
        for shard in tmp_path.glob("*.safetensors"):
            rewrite(shard, lambda tensors: tensors.update(_doubled(tensors)))
        index = json.loads((tmp_path / files.INDEX).read_text())
        index["weight_map"] = _doubled(index["weight_map"])
        (tmp_path / files.INDEX).write_text(json.dumps(index))
    expected = DeepSeekVL(CONFIGS[name])
    copy_weights(public, expected)
    read = from_pretrained(tmp_path)
    assert_same(read, expected)
    if name == "tiny":
        assert read.vision.downsample.alpha.item() == pytest.approx(ALPHA)


def _doubled(mapping):
    renamed = {re.sub("^model.vision_model.", "model.vision_model.vision_model.", key): mapping[key] for key in mapping}
    mapping.clear()
    return renamed


def test_transformers_default_of_a_tied_head_is_not_believed(saved, model):
    config = json.loads((saved / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]  # and so True
    (saved / "config.json").write_text(json.dumps(config))
    assert_same(from_pretrained(saved), model)
    rewrite(saved / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    assert from_pretrained(saved).config.language.tie_embeddings


@pytest.mark.parametrize("config_layout, weights_layout", [layouts.LAYOUTS, layouts.LAYOUTS[::-1]])
def test_config_and_weights_are_detected_apart(config_layout, weights_layout, model, tmp_path):
    save_pretrained(model, tmp_path, layout=weights_layout)
    (tmp_path / "config.json").write_text(json.dumps(layouts.config_to_dict(model.config, config_layout)))
    assert_same(from_pretrained(tmp_path), model)


def test_dtype_and_device_are_the_callers(saved, model):
    assert {p.dtype for p in from_pretrained(saved, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    on_meta = from_pretrained(saved, device="meta")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    rewrite(saved / "model.safetensors", lambda t: t.update({key: t[key].half() for key in t if "language" in key}))
    mixed = from_pretrained(saved)
    assert mixed.compute_dtype == torch.float16 and mixed.vision.downsample.alpha.dtype == torch.float32
    assert not mixed.training


def test_a_parameter_that_is_stored_in_parts_holds_all_of_their_dtypes(saved, model):
    prefix = "model.vision_model.encoder.layers.0.self_attn"
    narrow = {f"{prefix}.k_proj.weight": torch.float16, f"{prefix}.v_proj.weight": torch.bfloat16}
    rewrite(saved / "model.safetensors", lambda t: t.update({key: t[key].to(dtype) for key, dtype in narrow.items()}))
    read, exact = (m.vision.siglip.blocks[0].attn.qkv.weight for m in (from_pretrained(saved), model))
    assert read.dtype == torch.float32 and torch.equal(read[:32], exact[:32])
    narrow[f"{prefix}.q_proj.weight"] = torch.bfloat16
    rewrite(saved / "model.safetensors", lambda t: t.update({key: t[key].to(dtype) for key, dtype in narrow.items()}))
    read = from_pretrained(saved).vision.siglip.blocks[0].attn.qkv.weight
    assert read.dtype == torch.float32 and torch.equal(read[32:64], exact[32:64].half().float())


# Memory before a model is read and at the peak, in MB. The first model on "meta" is for what torch imports to make it.
PEAK = """
import sys
from pathlib import Path
import torch
from vlcore.checkpoint import from_pretrained
from vlcore.layouts import read_config
from vlcore.models import DeepSeekVL

def resident(kind):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1000

with torch.device("meta"):
    DeepSeekVL(read_config(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = resident("VmRSS")
model = from_pretrained(sys.argv[1])
print(before, resident("VmHWM"))
"""


def test_the_peak_of_memory_is_the_model_and_one_file(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is read from Linux's /proc")
    language = dataclasses.replace(preset("tiny").language, hidden_size=512, intermediate_size=2048, num_layers=16)
    with torch.device("meta"):
        model = DeepSeekVL(dataclasses.replace(preset("tiny"), language=language))
    save_pretrained(model.to_empty(device="cpu"), tmp_path, max_shard_size=4e7)
    sizes = [file.stat().st_size / 1e6 for file in tmp_path.glob("*.safetensors")]
    assert sum(sizes) > 200 and len(sizes) > 4
    output = subprocess.run([sys.executable, "-c", PEAK, tmp_path], check=True, capture_output=True, text=True).stdout
    before, peak = map(float, output.split())
    assert sum(sizes) <= peak - before <= sum(sizes) + max(sizes) + 60


def test_unused_weights_go_back_into_their_layout_unchanged(tmp_path, model):
    table = layouts.weight_table(model.config, "original")
    known = {b.key for b in layouts.bindings(model.config, "original") if b.parameter is None}
    assert len(known) == 17
    unused = {key: torch.randn(table[key]) for key in known}
    unused["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)
    save_pretrained(model, tmp_path / "a", layout="original")
    rewrite(tmp_path / "a" / "model.safetensors", lambda tensors: tensors.update(unused))
    read = from_pretrained(tmp_path / "a")
    assert read.unused.keys() == unused.keys()
    save_pretrained(read, tmp_path / "b", layout="original")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with pytest.warns(UserWarning, match=r"transformers layout has no place for 18 tensors .*attn_pool\.latent"):
        save_pretrained(read, tmp_path / "c")
    assert from_pretrained(tmp_path / "c").unused == {}


def test_transformers_pooling_head_is_known_and_never_applied(tmp_path):
    config = siglip_only(preset("tiny"))
    (tmp_path / "config.json").write_text(json.dumps(layouts.config_to_dict(config, "transformers")))
    model = telling_model(config)
    save_pretrained(model, tmp_path)
    head = {f"model.vision_model.head.{name}": torch.randn(3) for name in ("probe", "mlp.fc1.weight")}
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update(head))
    read = from_pretrained(tmp_path)
    assert read.unused.keys() == head.keys()
    save_pretrained(read, tmp_path)
    assert from_pretrained(tmp_path).unused.keys() == head.keys()


class TestPlainLlama:
    def write(self, directory, **fields):
        config = preset("tiny")
        model = telling_model(tied(config) if fields.get("tie_word_embeddings") else config)
        tensors = {
            binding.key: dict(model.named_parameters())[binding.parameter].detach()
            for binding in layouts.llama_bindings(model.config.language)
        }
        save_file(tensors, directory / "model.safetensors")
        raw = layouts.config_to_dict(preset("tiny"), "transformers")["text_config"] | fields
        (directory / "config.json").write_text(json.dumps(raw))
        return model

    @pytest.mark.parametrize("is_tied", [True, False])
    def test_reads_the_model_and_its_head(self, tmp_path, is_tied):
        model = self.write(tmp_path, tie_word_embeddings=is_tied)
        language, head = load_llama(tmp_path)
        for key, tensor in model.language.state_dict().items():
            assert torch.equal(language.state_dict()[key], tensor)
        assert torch.equal(head.weight, model.lm_head.weight)
        assert (head.weight is language.embed_tokens.weight) == is_tied

    def test_wants_a_llama(self, tmp_path):
        self.write(tmp_path, model_type="gpt2")
        with pytest.raises(ValueError, match="model_type is 'gpt2', not 'llama'"):
            load_llama(tmp_path)

    def test_names_what_is_missing(self, tmp_path):
        self.write(tmp_path)
        rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(ValueError, match=r"LLaMA's layout, do not fit config.json. 1 missing: model\.norm\.weight"):
            load_llama(tmp_path)
