"""The command's entry: a run out of a Python file, with changes."""

import signal

import pytest

from vlcore.cli import main
from vlcore.train import run_file, trainer

RUNS = """
from dataclasses import replace
from small_tokenizer import small_tokenizer
from toy_data import Listed, mixture, texts
from vlcore.config import preset
from vlcore.data import Entry, Mixture
from vlcore.processing import Processor
from vlcore.train import Stage, TrainConfig

def make(mix):
    config = preset("tiny")
    Processor(small_tokenizer(config), config).save_pretrained({folder!r} + "/processor")
    from vlcore.checkpoint import save_pretrained
    from vlcore.models import DeepSeekVL, init_weights
    model = DeepSeekVL(config)
    init_weights(model, 0)
    save_pretrained(model, {folder!r} + "/processor")
    stage = Stage(name="s", trains=("language",), mixture=mix, steps=9, learning_rate=1e-3, batch_size=2)
    return TrainConfig(
        model={folder!r} + "/processor",
        stages=(stage,), output_dir={folder!r} + "/out", precision="fp32", plot=False, save_model=False,
    )

def small():
    return make(mixture(articles=1))

def bad():
    return make(Mixture(entries=(Entry(source=Listed("ruin", "text", [None] * 9)),)))

def failing():
    def on_stage_end(*_):
        open("/nowhere/at/all")
    return replace(small(), on_stage_end=on_stage_end)

def nothing():
    return 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "runs.py"
    path.write_text(RUNS.replace("{folder!r}", repr(str(tmp_path))))
    return path


def test_a_run_out_of_a_file(file, capsys):
    assert run_file(f"{file}:small", ["stages.0.steps=2", "stages.0.sequence_length=64"]) == 0
    shown = capsys.readouterr().out
    assert (
        "s: 2 steps in" in shown
        and "4 samples" in shown
        and "0 bad samples, 0 too long" in shown
        and f"written to {file.parent / 'out'}" in shown
    )
    assert (file.parent / "out" / "metrics.jsonl").exists()


def test_a_stopped_run_says_why(file, capsys):
    assert run_file(f"{file}:bad", ["stages.0.sequence_length=64"]) == 1
    assert "vlcore train: 20 samples in a row drawn from 'ruin' are bad" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_stops_has_its_exit_status(file, capsys, monkeypatch, number):
    accumulate = trainer.Trainer._accumulate
    monkeypatch.setattr(
        trainer.Trainer, "_accumulate", lambda *given: signal.raise_signal(number) or accumulate(*given)
    )
    before = [(each, signal.signal(each, signal.SIG_DFL)) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert (
            main(["train", f"{file}:small", "stages.0.sequence_length=64", "stages.0.micro_batch_size=2"])
            == 128 + number
        )
    finally:
        for each in before:
            signal.signal(*each)
    shown = capsys.readouterr().err
    assert shown.startswith(f"vlcore train: stopped by {number.name} behind ") and "step-00000001, from which" in shown


def test_what_the_callback_fails_at_is_shown_with_its_traceback(file):
    with pytest.raises(RuntimeError, match="on_stage_end failed after stage 's': .*/nowhere/at/all") as failed:
        main(["train", f"{file}:failing", "stages.0.steps=1", "stages.0.sequence_length=64"])
    assert isinstance(failed.value.__cause__, FileNotFoundError)


def test_what_is_no_run_or_no_key_is_refused(file):
    with pytest.raises(ValueError, match="runs.py:nothing returned a int; it must return a TrainConfig"):
        run_file(f"{file}:nothing")
    with pytest.raises(ValueError, match="TrainConfig has no field 'stage'; did you mean 'stages'"):
        run_file(f"{file}:small", ["stage.0.steps=2"])
