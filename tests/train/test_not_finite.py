"""Steps whose loss or gradient is not finite: skipped, counted and named, and the end of a run where they go on."""

import json
import re

import pytest
import torch

from vlcore.config import preset
from vlcore.models import DeepSeekVL, init_weights
from vlcore.train import TrainingStopped


def fresh():
    model = DeepSeekVL(preset("tiny"))
    init_weights(model, 0)
    return model


def snapshot(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def poisoned(monkeypatch, steps, value=float("nan")):
    """Losses of the forwards whose numbers are given become `value`."""
    forward, calls = DeepSeekVL.forward, []

    def poisoning(self, *arguments, **keywords):
        out = forward(self, *arguments, **keywords)
        calls.append(1)
        return out._replace(loss=out.loss * value) if len(calls) - 1 in steps else out

    monkeypatch.setattr(DeepSeekVL, "forward", poisoning)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(run, stage, monkeypatch, value):
    model = fresh()
    poisoned(monkeypatch, {2}, value)
    result = run(stage(steps=2, batch_size=2), model=model)
    assert result.stages[0].skipped_steps == 0
    poisoned(monkeypatch, {0, 1}, value)
    before = snapshot(model)
    result = run(stage(steps=2, batch_size=2), model=model, folder="poisoned")
    assert result.stages[0].skipped_steps == 2
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [None, None]


def test_too_many_such_steps_in_a_row_stop_the_run_with_the_samples_named(run, stage, monkeypatch, tmp_path):
    poisoned(monkeypatch, {1, 4, 7})  # of two micro-batches a step: in steps 0, 2 and 3, there in the second
    with pytest.raises(TrainingStopped, match=r"2 text steps in a row .* step 3 with loss nan") as stopped:
        run(stage(steps=9), max_bad_steps=2, log_every=3, plot=True)
    assert len(named(stopped.value)) == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [(2, 2), (3, 3)]
    assert [len(row["suspects"]) for row in rows] == [4, 2] and rows[1]["suspects"] == named(stopped.value)
    assert (tmp_path / "run" / "loss.png").exists()


def named(error):
    """The samples that an error names."""
    return re.findall(r"\w+/\w+-\d+", str(error))


def test_steps_of_one_modality_in_a_row_stop_the_run_whatever_the_others_do(run, stage, monkeypatch, tmp_path):
    forward = DeepSeekVL.forward

    def blind(self, input_ids, pixels, *arguments, **keywords):
        out = forward(self, input_ids, pixels, *arguments, **keywords)
        return out if pixels is None else out._replace(loss=out.loss * float("nan"))

    monkeypatch.setattr(DeepSeekVL, "forward", blind)
    half = stage(sources={"captions": 1, "articles": 1}, steps=30)
    with pytest.raises(TrainingStopped, match="3 multimodal steps in a row .* with loss nan"):
        run(half, max_bad_steps=3, checkpoint_every=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["modality"] == "multimodal" for row in rows) == 3 and rows[-1]["modality"] == "multimodal"
    assert [row["modality"] for row in rows[:-1]].count("text") > 1
    for row in rows:
        skipped = 4 if row["modality"] == "multimodal" else 0
        assert [name.split("/")[0] for name in row["suspects"]] == ["captions"] * skipped
    with pytest.raises(TrainingStopped, match="3 multimodal steps in a row"):  # the count is in the checkpoint
        run(half, max_bad_steps=3, checkpoint_every=1)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(rows)
