from functools import partial

import pytest
import torch
from small_tokenizer import small_tokenizer
from toy_data import mixture

from vlcore.config import preset
from vlcore.processing import Processor
from vlcore.train import Stage, TrainConfig, train, trainer

CONFIG = preset("tiny")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring at these sizes, and much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processor():
    return Processor(small_tokenizer(CONFIG), CONFIG)


@pytest.fixture
def stage():
    """A stage of a few steps on text, with whatever is asked changed."""
    return partial(_stage, name="only", trains=("language",), steps=3, learning_rate=1e-3)


def _stage(*, sources=None, **settings):
    defaults = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 128}
    return Stage(mixture=mixture(**(sources or {"articles": 1})), **{**defaults, **settings})


@pytest.fixture
def run(processor, tmp_path):
    """Train tiny in float32 through the stages given; nothing is drawn or exported unless asked."""

    def run(*stages, model=None, folder="run", **settings):
        defaults = {"precision": "fp32", "plot": False, "save_model": False, "seed": 1}
        config = TrainConfig(model=CONFIG, stages=stages, output_dir=tmp_path / folder, **{**defaults, **settings})
        return train(config, model, processor)

    return run


class Interrupted(Exception):
    pass


@pytest.fixture
def stages(stage):
    """Three short stages that use everything the paper's do."""
    both = {"captions": 1, "articles": 2}
    return (
        stage(name="one", trains=("adaptor",), sources={"captions": 1}, warmup_steps=2),
        stage(name="two", trains=("adaptor", "language"), sources=both, packing=True, steps=4, schedule="step"),
        stage(name="three", trains=("language", "adaptor", "siglip"), sources={"instructions": 1}, supervise="answers"),
    )


@pytest.fixture
def interrupted_after(monkeypatch):
    """Make the trainer fail after some steps, then let it work again."""

    def interrupted_after(steps, call):
        step, taken = trainer.Trainer._step, []

        def failing(self, *arguments):
            if len(taken) == steps:
                raise Interrupted
            taken.append(1)
            return step(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "_step", failing)
            with pytest.raises(Interrupted):
                call()

    return interrupted_after


@pytest.fixture
def interrupted(run, stages, interrupted_after, tmp_path):
    """A run stopped in its second stage, and its last checkpoint."""
    interrupted_after(5, lambda: run(*stages, checkpoint_every=2))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-00000004")
    return checkpoint
