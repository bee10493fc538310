"""Stopping and going on: bit for bit the run that was not stopped, or an error that names what is in the way."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_tokenizer import small_tokenizer

from vlcore.config import preset
from vlcore.processing import ChatTemplate, Processor
from vlcore.train import TrainConfig, train, trainer
from vlcore.train import state as state_module

TIMES = ("seconds", "data_wait", "samples_per_second", "tokens_per_second", "images_per_second")


def weights(result):
    return {name: parameter.detach().clone() for name, parameter in result.model.named_parameters()}


def assert_same_run(one, two):
    for name, parameter in weights(one).items():
        assert torch.equal(parameter, weights(two)[name]), name
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]
        for path in (one.output_dir / "metrics.jsonl", two.output_dir / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    for a, b in zip(one.stages, two.stages, strict=True):
        assert replace(a, seconds=0.0) == replace(b, seconds=0.0)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, stages, interrupted_after):
    whole = run(*stages, folder="whole", checkpoint_every=2)
    # Within a stage, at its end, after a checkpoint that is some steps old, and with other workers.
    for stop, workers in ((2, 0), (3, 0), (5, 1), (8, 0)):
        settings = {"folder": f"stopped at {stop}", "checkpoint_every": 2}
        interrupted_after(stop, lambda settings=settings: run(*stages, **settings))
        assert_same_run(whole, run(*stages, num_workers=workers, **settings))


def test_a_resumed_optimizer_is_the_uninterrupted_one(run, stages, interrupted_after, tmp_path):
    run(*stages[:2], folder="whole", checkpoint_every=3)
    interrupted_after(4, lambda: run(*stages[:2], folder="resumed", checkpoint_every=3))
    run(*stages[:2], folder="resumed", checkpoint_every=3)
    file = "checkpoints/step-00000006/optimizer.safetensors"
    whole, resumed = (load_file(tmp_path / folder / file) for folder in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and len(whole) > 10
    assert all(torch.equal(whole[key], resumed[key]) for key in whole if key != state_module.RNG)


def test_a_finished_run_is_not_run_again(run, stages):
    first = run(*stages[:1])
    again = run(*stages[:1])
    assert_same_run(first, again)
    assert again.stages == first.stages


def test_a_finished_run_goes_on_with_another_stage(run, stages):
    whole = run(*stages[:2], folder="whole")
    run(stages[0])
    assert_same_run(whole, run(*stages[:2]))
    with pytest.raises(ValueError, match=r"its stages\.1 is {'name': 'two'.*, the configuration's None"):
        run(stages[0])


def test_resume_false_begins_again_and_removes_what_was_there(run, stages):
    run(*stages[:2], checkpoint_every=2)
    again = run(*stages[:1], resume=False)
    assert [path.name for path in sorted((again.output_dir / "checkpoints").iterdir())] == ["step-00000003-done"]
    assert len((again.output_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_checkpoints_may_be_read_by_whom_the_umask_allows(run, stage):
    before = os.umask(0o027)
    try:
        folder = run(stage(steps=2), checkpoint_every=1).output_dir / "checkpoints"
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*/*")} == {0o640}


def test_only_the_newest_checkpoints_are_kept(run, stage):
    result = run(stage(steps=7), checkpoint_every=2, keep=2)
    names = [path.name for path in sorted((result.output_dir / "checkpoints").iterdir())]
    assert names == ["step-00000006", "step-00000007-done"]


def test_a_failure_in_the_callback_costs_no_training(run, stages, monkeypatch):
    def failing(*_):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run(*stages[:1], on_stage_end=failing)
    called = []
    monkeypatch.setattr(trainer.Trainer, "_step", failing)
    result = run(
        *stages[:1], on_stage_end=lambda stage, model, processor, total: called.append((stage.name, total.steps))
    )
    assert called == [("one", 3)] and result.stages[0].steps == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.5}, r"its stages\.1\.learning_rate is 0\.001, the configuration's 0\.5"),
        ({"text_ratio": 0.5}, r"its stages\.1\.text_ratio is None, the configuration's 0\.5"),
        ({"name": "other"}, r"its stages\.1\.name is 'two', the configuration's 'other'"),
    ],
)
def test_another_configuration_is_refused_by_its_first_difference(run, stages, interrupted, change, message):
    with pytest.raises(ValueError, match=message):
        run(stages[0], replace(stages[1], **change), stages[2])


def test_a_checkpoint_that_counts_bad_steps_over_all_modalities_is_gone_on_with(run, stages, interrupted):
    state = json.loads((interrupted / "state.json").read_text())
    state["progress"]["bad_steps"] = 3
    (interrupted / "state.json").write_text(json.dumps(state))
    assert len(run(*stages, max_bad_steps=3).stages) == 3


def test_another_seed_or_mixture_is_refused(run, stages, interrupted, stage):
    with pytest.raises(ValueError, match="its seed is 1, the configuration's 2"):
        run(*stages, seed=2)
    other = stage(sources={"captions": 1, "articles": 5}).mixture
    with pytest.raises(ValueError, match=r"stages\.1\.mixture\.1\.weight is 2, the configuration's 5"):
        run(stages[0], replace(stages[1], mixture=other), stages[2])


def test_another_tokenizer_or_template_is_refused(stages, interrupted, tmp_path):
    config = preset("tiny")
    settings = TrainConfig(model="tiny", stages=stages, output_dir=tmp_path / "run", precision="fp32", seed=1)
    other = small_tokenizer(config)
    other.add_tokens(["another word"])
    with pytest.raises(ValueError, match="its tokenizer is '[0-9a-f]{64}', the configuration's '[0-9a-f]{64}'"):
        train(settings, processor=Processor(other, config))
    template = ChatTemplate(system="Be brief.")
    with pytest.raises(ValueError, match=r"its template\.system is 'You .*, the configuration's 'Be brief\.'"):
        train(settings, processor=Processor(small_tokenizer(config), config, template))


def test_what_changes_no_result_and_stages_not_begun_may_change(run, stages, interrupted):
    later = replace(stages[2], learning_rate=0.5)
    result = run(stages[0], replace(stages[1], micro_batch_size=1), later, log_every=2, keep=5)
    assert len(result.stages) == 3


def test_what_a_killed_save_left_is_cleared(run, stages, interrupted, tmp_path):
    names = (".step-00000006.0a.incomplete", "../.model.0a.incomplete", "../..model.0a.incomplete.1b.incomplete")
    leftovers = [interrupted.parent / name for name in names]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "bad_samples.jsonl", "loss.png"):
        leftovers.append(tmp_path / "run" / f".{name}.0a0b0c0d.partial")
        leftovers[-1].write_bytes(b"half")
    run(*stages)
    assert not any(leftover.exists() for leftover in leftovers)


def test_only_what_was_written_as_a_checkpoint_is_gone_on_with_and_deleted(run, stages, interrupted):
    others = [
        interrupted.with_name(name)
        for name in ("step-best", "step-000000020", "step-00000099-old", ".step-x.incomplete")
    ]
    for other in others:
        shutil.copytree(interrupted, other)
    result = run(*stages, checkpoint_every=1, keep=1)
    assert result.stages[-1].steps == 3
    names = {path.name for path in interrupted.parent.iterdir()}
    assert names == {"step-00000010-done", *(other.name for other in others)}
    run(stages[0], resume=False)
    assert all((other / "state.json").exists() for other in others)


def test_a_run_that_cannot_be_removed_is_not_gone_on_with(run, stages, interrupted, tmp_path):
    interrupted.parent.rename(tmp_path / "elsewhere")
    interrupted.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        run(*stages, resume=False)
    assert interrupted.exists()


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_leaves_the_checkpoints_that_were_there(run, stages, interrupted, monkeypatch, error):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    before = {path.name: (path / "state.json").read_text() for path in interrupted.parent.iterdir()}
    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(OSError, match=r"step-00000006 could not be written, .* are whole: .*No space left"):
        run(*stages, checkpoint_every=2)
    assert {path.name: (path / "state.json").read_text() for path in interrupted.parent.iterdir()} == before
    monkeypatch.undo()
    assert len(run(*stages).stages) == 3


def test_a_disk_that_fills_up_behind_the_writing_is_named_too(run, stages, interrupted, monkeypatch):
    def full(descriptor):
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == "state.json":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"step-00000006 could not be written, .* are whole: .*No space left"):
        run(*stages, checkpoint_every=2)
