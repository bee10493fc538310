import pytest
from small_tokenizer import small_tokenizer

from vlcore.config import preset
from vlcore.processing import Processor


@pytest.fixture(scope="session")
def processor():
    config = preset("tiny")
    return Processor(small_tokenizer(config), config)
