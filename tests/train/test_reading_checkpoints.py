"""A run's checkpoint is a model's directory too, with which one sees how far the run is."""

import pytest
import torch
from checkpoints import CONFIGS, assert_same, rewrite, telling_model
from small_tokenizer import small_tokenizer

from vlcore.checkpoint import from_pretrained, save_pretrained
from vlcore.processing import Processor
from vlcore.train.state import Progress, save_checkpoint


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_is_read_as_it_was_saved(name, tmp_path):
    model, config = telling_model(CONFIGS[name]), CONFIGS[name]
    processor = Processor(small_tokenizer(config), config)
    path = save_checkpoint(tmp_path, Progress(), {}, model, processor, keep=1)
    read = from_pretrained(path)
    assert_same(read, model)
    assert not read.training
    save_pretrained(read, tmp_path / "public")
    assert_same(from_pretrained(tmp_path / "public"), model)
    assert from_pretrained(path, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16


def test_the_processor_is_beside_the_model(interrupted, processor):
    read = Processor.from_pretrained(interrupted)
    assert read.config == from_pretrained(interrupted).config == processor.config
    assert read.encode_text("a flag") == processor.encode_text("a flag")


def test_what_does_not_fit_is_named(interrupted):
    """As where layers had been replaced by others."""

    def change(tensors):
        tensors["language.layers.0.mlp.up_proj.lora_a"] = tensors.pop("language.layers.0.mlp.up_proj.weight")

    rewrite(interrupted / "model.safetensors", change)
    missing = r"1 missing: language\.layers\.0\.mlp\.up_proj\.weight"
    with pytest.raises(ValueError, match=rf"a training run's layout, .*{missing}; 1 unexpected: .*lora_a"):
        from_pretrained(interrupted)
    (interrupted / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_pretrained(interrupted)
