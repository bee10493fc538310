from functools import partial

import pytest
import torch
from small_tokenizer import small_tokenizer
from toy_data import mixture

from vlcore.config import preset
from vlcore.processing import Processor
from vlcore.train import Stage, TrainConfig, train

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
