"""What a run starts from: devices, compilation, and a model and processor that belong together."""

from dataclasses import replace

import pytest
import torch
from small_tokenizer import small_tokenizer
from torch._dynamo.utils import counters

from vlcore.config import preset
from vlcore.models import DeepSeekVL, init_weights, quantize
from vlcore.processing import Processor
from vlcore.train import TrainConfig, start, train


@pytest.fixture
def model():
    model = DeepSeekVL(preset("tiny"))
    init_weights(model, 1)
    return model


@pytest.fixture
def config(stage, tmp_path):
    return TrainConfig(model="tiny", stages=(stage(steps=1),), output_dir=tmp_path, plot=False, save_model=False)


def test_a_model_is_made_on_the_device_that_is_named_or_on_a_gpu(config, monkeypatch):
    assert start.load_model(replace(config, device="meta")).lm_head.weight.device.type == "meta"
    assert start.load_model(replace(config, device="cpu")).lm_head.weight.device.type == "cpu"
    wanted = []
    monkeypatch.setattr(start, "_device", lambda name: wanted.append(name) or torch.device("cpu"))
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        start.load_model(config)
    assert wanted == ["cuda", "cpu"]


def test_a_model_that_is_handed_over_stays_where_it_is_unless_told(config, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert start.place(model.bfloat16(), config).lm_head.weight.device.type == "cpu"
    assert model.lm_head.weight.dtype == torch.float32
    assert start.place(model, replace(config, device="meta")).lm_head.weight.device.type == "meta"


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(config, model, processor, device):
    with pytest.raises(ValueError, match=f"device is '{device}', which cannot be used: "):
        train(replace(config, device=device), model, processor)
    with pytest.raises(ValueError, match=f"device is '{device}', which cannot be used: "):
        train(replace(config, device=device), processor=processor)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pad_color": (1, 2, 3)}, r"pad_color is \(1, 2, 3\), the model's \(122, 116, 104\)"),
        ({"bos_token_id": 2}, "bos_token_id is 2, the model's 1"),
        ({"eos_token_id": 1}, "eos_token_id is 1, the model's 2"),
    ],
)
def test_a_processor_of_another_model_is_refused(config, model, change, message):
    own, language = preset("tiny"), {key: value for key, value in change.items() if key.endswith("_id")}
    others = {key: value for key, value in change.items() if key not in language}
    other = replace(own, language=replace(own.language, **language), **others)
    with pytest.raises(ValueError, match=f"The processor's {message}"):
        train(config, model, Processor(small_tokenizer(own), other))


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(config):
    own = preset("tiny")
    small = replace(own, language=replace(own.language, vocab_size=64))
    processor = Processor(small_tokenizer(own), own)
    with pytest.raises(ValueError, match=rf"makes ids up to {processor.num_token_ids - 1}; the model has 64"):
        train(config, DeepSeekVL(small), processor)


def test_a_quantised_model_is_refused(config, model, processor):
    quantize(model)
    with pytest.raises(ValueError, match="quantised cannot be trained: language.* holds integers"):
        train(config, model, processor)


def test_one_of_several_processes_is_refused(config, model, processor, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but training is one process today"):
        train(config, model, processor)
    assert list(config.output_dir.iterdir()) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train(config, model, processor).stages[0].steps == 1


def test_a_backend_that_is_not_there_is_refused(config, model, processor):
    with pytest.raises(ValueError, match="compile is 'indctor'; there are the backends .*inductor"):
        train(replace(config, compile="indctor"), model, processor)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_ratio": 0.5}, "Stage 'late': text_ratio 0.5 needs images, but every source is text"),
        ({"sources": {"captions": 1}, "text_ratio": 0.5}, "Stage 'late': text_ratio 0.5 .* needs text"),
        ({"sources": {"captions": 1}, "modality_warmup": 0.1}, "Stage 'late': .* modality_warmup 0.1 needs text"),
        (
            {"sources": {"instructions": 1, "articles": 1}, "supervise": "answers"},
            "Stage 'late': only answers are supervised, but 'articles' holds documents",
        ),
    ],
)
def test_a_stage_without_what_it_draws_is_refused_before_anything_is_trained_or_deleted(
    stage, config, model, processor, change, message
):
    train(config, model, processor)
    before = {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")}
    again = replace(config, stages=(*config.stages, stage(name="late", **change)), resume=False)
    with pytest.raises(ValueError, match=message):
        train(again, model, processor)
    assert {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")} == before


def test_a_compiled_run_gives_the_same_losses_and_compiles_every_shape(stage, tmp_path):
    """Texts and images, padded and packed, in batches of two and of one: the compiler never gives up."""
    tiny = preset("tiny")
    small = replace(tiny, sam=None, adaptor="mlp_gelu", siglip=replace(tiny.siglip, num_layers=1))
    processor, block_names = Processor(small_tokenizer(small), small), ("language.layers.0", "language.layers.1")
    both = {"captions": 1, "articles": 1}
    settings = {"sources": both, "trains": ("language", "adaptor"), "batch_size": 3, "steps": 2, "grouping": False}
    stages = (stage(**settings), stage(name="packed", packing=True, samples_per_sequence=1, **settings))
    config = TrainConfig(
        model=small, stages=stages, output_dir=tmp_path / "plain", precision="fp32", plot=False, save_model=False
    )
    plain = train(config, processor=processor)
    model = start.load_model(config)
    first, second = map(model.get_submodule, block_names)
    second.compile(backend="eager")
    compiled_before = second._compiled_call_impl
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = train(replace(config, output_dir=tmp_path / "compiled", compile="aot_eager"), model, processor)
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0 and not counters["graph_break"]
    for one, other in zip(compiled.stages, plain.stages, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert second._compiled_call_impl is compiled_before and first._compiled_call_impl is None
