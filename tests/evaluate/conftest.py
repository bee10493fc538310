import pytest
import torch
from small_tokenizer import small_tokenizer

from vlcore.config import preset
from vlcore.models import DeepSeekVL, init_weights
from vlcore.processing import Processor


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring at these sizes, and much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processor():
    config = preset("tiny")
    return Processor(small_tokenizer(config), config)


@pytest.fixture(scope="session")
def model():
    """Random weights at a scale where every token matters to what follows."""
    model = DeepSeekVL(preset("tiny"))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model
