"""SIGTERM and Ctrl-C: the step is finished, a checkpoint written, and what is gone on with ends in the same bits."""

import json
import multiprocessing
import os
import signal
import threading

import pytest
import torch

from vlcore.train import TrainingInterrupted, trainer

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def defaults():
    """What a program that is started in a terminal has, whatever runs the tests."""
    usual = (signal.default_int_handler, signal.SIG_DFL)
    before = [signal.signal(number, default) for number, default in zip(BOTH, usual, strict=True)]
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def sent_in_step(monkeypatch):
    """Send signals to this process in the middle of a step, counted over all stages from 0."""

    def sent_in_step(number, *signals):
        next_portion, steps = trainer.Trainer._next, []

        def sending(self, portions, record):
            if record.global_step == number and number not in steps:
                steps.append(number)
                for each in signals:
                    os.kill(os.getpid(), each)
            return next_portion(self, portions, record)

        monkeypatch.setattr(trainer.Trainer, "_next", sending)

    return sent_in_step


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("told", [True, False])
def test_the_step_is_finished_and_the_run_goes_on_in_the_same_bits(
    run, stage, tmp_path, sent_in_step, number, step, told
):
    stages = (stage(name="a"), stage(name="b", sources={"captions": 1}))
    ends = []
    settings = {"on_stage_end": lambda stage, *_: ends.append(stage.name)} if told else {}
    whole = run(*stages, folder="whole")
    sent_in_step(step, number)
    with pytest.raises(
        TrainingInterrupted, match=rf"stopped by {number.name} behind .*step-0000000{step + 1}"
    ) as stopped:
        run(*stages, **settings)
    assert stopped.value.number == number and len(losses(tmp_path / "run")) == step + 1
    assert [signal.getsignal(each) for each in BOTH] == [signal.default_int_handler, signal.SIG_DFL]
    resumed = run(*stages, **settings)
    assert ends == (["a", "b"] if told else [])
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_second_one_ends_it_at_once(run, stage, tmp_path, sent_in_step):
    sent_in_step(1, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(stage())
    assert not isinstance(stopped.value, TrainingInterrupted)
    assert not (tmp_path / "run" / "checkpoints").exists() and len(losses(tmp_path / "run")) == 1


def test_a_callback_is_ended_at_once_for_it_costs_no_training(run, stage, tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(stage(steps=1), on_stage_end=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert not isinstance(stopped.value, TrainingInterrupted)
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").exists()


def test_workers_leave_it_to_the_run(run, stage, monkeypatch):
    step = trainer.Trainer._step

    def sending(self, *arguments):
        for worker in multiprocessing.active_children():
            for number in BOTH:
                os.kill(worker.pid, number)
        return step(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_step", sending)
    assert run(stage(steps=20), num_workers=1).stages[0].steps == 20


def test_what_is_ignored_or_handled_already_stays_so(run, stage, sent_in_step):
    handled = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: handled.append(number))
    sent_in_step(0, *BOTH)
    assert run(stage(steps=1)).stages[0].steps == 1 and handled == [signal.SIGTERM]


def test_a_run_may_be_in_another_thread(run, stage):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(stage(steps=1))))
    thread.start()
    thread.join()
    assert results[0].stages[0].steps == 1
