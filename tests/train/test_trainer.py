"""What a run does besides descending: freezing, precision, bad data, records, the final model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tokenizer import small_tokenizer
from toy_data import Listed, captions, instructions, texts

import vlcore
from vlcore.config import preset
from vlcore.data import Entry, Mixture
from vlcore.models import DeepSeekVL, init_weights
from vlcore.models.llama import LlamaLayer
from vlcore.train import TrainConfig, TrainingStopped, train
from vlcore.train.start import load_model, load_processor

ALL = ("adaptor", "language", "siglip", "sam")


def lines(result):
    return [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]


def snapshot(model):
    return {part: [p.detach().clone() for p in parameters] for part, parameters in model.parts().items()}


def fresh(seed=0):
    model = DeepSeekVL(preset("tiny"))
    init_weights(model, seed)
    return model


def of(*sources):
    return Mixture(entries=tuple(Entry(source=source) for source in sources))


@pytest.mark.parametrize("trains", [("adaptor",), ("adaptor", "language"), ("siglip", "sam")])
def test_only_the_parts_named_change(run, stage, trains):
    model = fresh()
    before = snapshot(model)
    run(stage(trains=trains, sources={"captions": 1}, steps=1), model=model)
    for part, parameters in snapshot(model).items():
        changed = [not torch.equal(a, b) for a, b in zip(before[part], parameters, strict=True)]
        assert any(changed) == (part in trains), part
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_leaves_the_models_settings_as_they_were(run, stage):
    model = fresh()
    model.lm_head.weight.requires_grad_(False)
    modes = []
    result = run(
        stage(steps=1),
        model=model,
        precision="bf16",
        activation_checkpointing=True,
        on_stage_end=lambda stage, model, *_: modes.append((model.training, model.compute_dtype)),
    )
    assert modes == [(False, torch.bfloat16)]
    assert result.model is model and not model.training
    assert model.compute_dtype == torch.float32 and not model.language.activation_checkpointing
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_bf16_computes_in_bf16_over_float32_weights(run, stage, monkeypatch):
    seen = []
    forward = DeepSeekVL.forward

    def watching(self, *arguments, **keywords):
        out = forward(self, *arguments, **keywords)
        seen.append(out.hidden.dtype)
        return out

    monkeypatch.setattr(DeepSeekVL, "forward", watching)
    wide = run(stage(sources={"captions": 1}, trains=ALL), folder="fp32")
    narrow = run(stage(sources={"captions": 1}, trains=ALL), folder="bf16", precision="bf16")
    assert seen[0] == torch.float32 and seen[-1] == torch.bfloat16
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.float32}
    assert narrow.stages[0].loss == pytest.approx(wide.stages[0].loss, rel=0.02)


def test_a_model_in_another_dtype_is_trained_in_float32(run, stage):
    model = run(stage(steps=1), model=fresh().bfloat16()).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_recomputed_activations_change_nothing(run, stage, monkeypatch):
    calls, forward = [], LlamaLayer.forward
    monkeypatch.setattr(LlamaLayer, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    settings = stage(sources={"captions": 1}, trains=ALL)
    plain = run(settings, folder="plain")
    assert len(calls) == 12
    recomputed = run(settings, folder="recomputed", activation_checkpointing=True)
    assert len(calls) == 12 + 2 * 12
    assert [line["loss"] for line in lines(plain)] == [line["loss"] for line in lines(recomputed)]


def test_a_model_learns(run, stage):
    few = Mixture(entries=(Entry(source=captions(count=4)),))
    result = run(replace(stage(trains=("adaptor", "language"), steps=40, learning_rate=1e-2), mixture=few))
    losses = [line["loss"] for line in lines(result)]
    assert losses[0] > 5 and losses[-1] < 0.7 * losses[0]
    assert result.stages[0].loss == pytest.approx(
        sum(line["loss"] * line["supervised_tokens"] for line in lines(result)[36:])
        / sum(line["supervised_tokens"] for line in lines(result)[36:])
    )


def test_metrics_say_what_happened(run, stage):
    result = run(stage(sources={"captions": 1, "articles": 3}, steps=6, name="mix"), stage(name="next", steps=2))
    rows = lines(result)
    assert [(row["stage"], row["step"], row["global_step"]) for row in rows[4:]] == [
        ("mix", 4, 4),
        ("mix", 5, 5),
        ("next", 0, 6),
        ("next", 1, 7),
    ]
    assert {row["modality"] for row in rows} == {"text", "multimodal"}
    for row in rows:
        assert 0 <= row["data_wait"] <= 1 and row["samples_per_second"] > 0 and row["tokens_per_second"] > 0
        assert (row["images_per_second"] > 0) == (row["modality"] == "multimodal")
        assert sum(row["token_share"].values()) == pytest.approx(1, abs=1e-3)
        assert row["grad_norm"] > 0 and row["learning_rate"] > 0 and row["skipped_steps"] == 0
    text_steps = sum(row["modality"] == "text" for row in rows[:6])
    assert rows[5]["sample_share"].get("articles") == pytest.approx(text_steps / 6, abs=1e-3)
    total = result.stages[0]
    assert (total.samples, total.images) == (24, 4 * (6 - text_steps))
    assert total.samples_per_second > 0


def test_lines_sum_up_steps(run, stage):
    single, summed = run(stage(steps=5), folder="a"), run(stage(steps=5), folder="b", log_every=2)
    assert [row["step"] for row in lines(summed)] == [1, 3, 4]
    first, second = lines(single)[:2]
    expected = first["loss"] * first["supervised_tokens"] + second["loss"] * second["supervised_tokens"]
    assert lines(summed)[0]["loss"] == pytest.approx(
        expected / (first["supervised_tokens"] + second["supervised_tokens"])
    )


def test_bad_samples_are_listed_once_and_counted(run, stage):
    source = Listed("half", "text", [None, *texts("half", 8).samples[1:]])
    result = run(replace(stage(steps=12), mixture=of(source)), max_bad_samples=0.9)
    listed = [json.loads(line) for line in (result.output_dir / "bad_samples.jsonl").read_text().splitlines()]
    assert listed == [{"source": "half", "sample_id": "half-0", "reason": "it is broken"}]
    assert result.stages[0].bad_samples == lines(result)[-1]["bad_samples"] > 1
    assert result.stages[0].samples == 48


def test_too_many_bad_samples_stop_the_run_with_the_file_named(run, stage):
    source = Listed("ruin", "text", [None] * 30 + texts("ruin", 30).samples)
    with pytest.raises(TrainingStopped, match=r"of \d+ samples drawn are bad, .* 5.0% .*bad_samples\.jsonl lists them"):
        run(replace(stage(steps=12), mixture=of(source)))


def test_the_limit_is_of_good_and_bad_samples_together(run, stage, tmp_path):
    """What is too long is not among the samples drawn, whose good ones are four a step."""
    source = Listed("half", "text", [None] * 30 + texts("half", 30).samples + texts("long", 30, length=300).samples)
    with pytest.raises(TrainingStopped) as stopped:
        run(replace(stage(steps=12), mixture=of(source)))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["overlong_samples"] > 0
    bad, good = last["bad_samples"], 4 * (last["step"] + 1)
    assert str(stopped.value).startswith(f"{bad} of {bad + good} samples drawn are bad")


def test_samples_that_are_too_long_are_counted_and_do_not_stop_the_run(run, stage):
    source = Listed("mixed", "text", texts("mixed", 10).samples + texts("long", 10, length=300).samples)
    result = run(replace(stage(steps=6), mixture=of(source)), max_bad_samples=0.0)
    assert result.stages[0].bad_samples == 0 and result.stages[0].samples == 24
    assert result.stages[0].overlong_samples == lines(result)[-1]["overlong_samples"] > 8
    listed = [json.loads(line) for line in (result.output_dir / "bad_samples.jsonl").read_text().splitlines()]
    assert all("tokens, over the sequence length of 128" in row["reason"] for row in listed)


def test_a_source_of_bad_samples_stops_the_run_with_the_file_named(run, stage, tmp_path):
    with pytest.raises(TrainingStopped, match=r"drawn from 'ruin' are bad.*bad_samples\.jsonl lists"):
        run(replace(stage(), mixture=of(Listed("ruin", "text", [None] * 9))))
    assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) == 9


def test_a_run_that_stops_before_its_first_step_draws_nothing(run, stage, tmp_path):
    with pytest.raises(TrainingStopped, match="drawn from 'ruin' are bad"):
        run(replace(stage(), mixture=of(Listed("ruin", "text", [None] * 9))), plot=True)
    assert not (tmp_path / "run" / "loss.png").exists()


def test_stage_ends_are_told(run, stage):
    told = []
    result = run(
        stage(name="a", steps=1),
        stage(name="b", steps=2),
        on_stage_end=lambda stage, model, processor, total: told.append((stage.name, total.steps, model.training)),
    )
    assert told == [("a", 1, False), ("b", 2, False)]
    assert [total.name for total in result.stages] == ["a", "b"]


def test_the_final_model_and_the_plot_are_written(run, stage, processor):
    result = run(stage(sources={"captions": 1, "articles": 1}, steps=4), save_model=True, plot=True)
    model = vlcore.from_pretrained(result.output_dir / "model")
    for (name, one), (_, two) in zip(result.model.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    read = vlcore.Processor.from_pretrained(result.output_dir / "model")
    assert read.encode_text("a cat") == processor.encode_text("a cat")
    assert (result.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in result.output_dir.iterdir()}
    assert names == {".lock", "checkpoints", "loss.png", "metrics.jsonl", "model"}


@pytest.mark.parametrize("failing", ["vlcore.checkpoint.writing.save_file", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_the_final_model_that_was_there(run, stage, monkeypatch, failing):
    target = run(stage(steps=1), save_model=True).output_dir / "model"
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= before.keys()
    write_text = Path.write_text

    def full(*arguments, **keywords):
        # The checkpoints, which come first, hold a template too.
        if failing.endswith("save_file") or (
            ".chat_template.jinja" in arguments[0].name and arguments[0].parent.name.startswith(".model.")
        ):
            raise OSError(28, "No space left on device")
        return write_text(*arguments, **keywords)

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match=r"run/model could not be written and is as it was: .*No space left"):
        run(stage(steps=1, learning_rate=0.5), model=fresh(1), resume=False, save_model=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert list(target.parent.glob(".model.*")) == []


def test_a_final_model_takes_the_place_of_one_in_shards(run, stage, tmp_path):
    vlcore.checkpoint.save_pretrained(fresh(), tmp_path / "run" / "model", max_shard_size=1e5)
    assert (tmp_path / "run" / "model" / "model.safetensors.index.json").exists()
    names = {path.name for path in (run(stage(steps=1), save_model=True).output_dir / "model").iterdir()}
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}


def test_a_plot_without_matplotlib_is_refused_before_training(run, stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"loss.png needs matplotlib: pip install 'vlcore\[plot\]'"):
        run(stage(), plot=True)


def test_nothing_is_printed_without_a_terminal(run, stage, capfd):
    run(stage(steps=1))
    assert capfd.readouterr() == ("", "")


def test_a_terminal_sees_the_progress(run, stage, monkeypatch, capfd):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    run(stage(steps=2))
    shown = capfd.readouterr().err
    for part in ("only", "2/2", "text loss", "tokens/s", "images/s", "data wait"):
        assert part in shown


@pytest.mark.parametrize(
    "change, sources, message",
    [
        ({"trains": ("adaptor",)}, {"captions": 1, "articles": 1}, "which text without images does not reach"),
        ({"sequence_length": 513}, {"articles": 1}, "sequence_length 513 is over the model's 512 positions"),
        (
            {"sequence_length": 17},
            {"captions": 1},
            "sequence_length 17 has no room for an image: .* 16 image .* need 18",
        ),
    ],
)
def test_stages_that_would_train_nothing_are_refused(run, stage, change, sources, message):
    with pytest.raises(ValueError, match=message):
        run(stage(sources=sources, **change))


def test_parts_that_the_model_lacks_are_refused(run, stage, processor, tmp_path):
    config = replace(preset("tiny"), sam=None, adaptor="mlp_gelu")
    model = DeepSeekVL(config)
    with pytest.raises(ValueError, match="The processor's image_size is 160, the model's 64"):
        run(stage(), model=model)
    stages = (stage(trains=("sam",), sources={"captions": 1}),)
    settings = TrainConfig(model=config, stages=stages, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'only' trains \['sam'\], which this model does not have"):
        train(replace(settings, plot=False), model, vlcore.Processor(small_tokenizer(config), config))


def test_models_and_processors_are_found_by_preset_and_directory(run, stage, processor):
    settings = TrainConfig(model="tiny", stages=(stage(),), output_dir="x", seed=4)
    one, two = load_model(settings), load_model(replace(settings, model=preset("tiny")))
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, load_model(replace(settings, seed=5)).lm_head.weight)
    with pytest.raises(ValueError, match="fresh weights bring no tokenizer"):
        load_processor(settings)
    with pytest.raises(ValueError, match="'tinny' is neither a preset .* nor a directory"):
        load_model(replace(settings, model="tinny"))
    saved = run(stage(steps=1), save_model=True).output_dir / "model"
    assert load_processor(replace(settings, processor=saved)).encode_text("cat") == processor.encode_text("cat")
    assert load_processor(replace(settings, model=saved)).pad_token_id == processor.pad_token_id
    assert load_model(replace(settings, model=str(saved))).lm_head.weight.dtype == torch.float32


def test_instructions_train_answers_alone(run, stage):
    result = run(replace(stage(supervise="answers", trains=ALL, steps=2), mixture=of(instructions())))
    total = result.stages[0]
    assert 0 < total.supervised_tokens < total.tokens - 16 * total.images
