"""What models do around their operators neither waits for the device nor brings it numbers: a CUDA graph holds it."""

import pytest
import torch
from conftest import DEVICE
from torch.overrides import TorchFunctionMode

from vlcore.config import preset
from vlcore.cuda_graph import CudaGraphs
from vlcore.decoding import KVCache
from vlcore.models import DeepSeekVL, init_weights
from vlcore.models.layers import normalized

TENSOR = torch.Tensor
BRING = {torch.tensor, torch.as_tensor, torch.from_numpy, TENSOR.new_tensor}
WAIT = {TENSOR.item, TENSOR.tolist, TENSOR.cpu, TENSOR.numpy, TENSOR.nonzero, torch.nonzero, TENSOR.__bool__}
WAIT |= {TENSOR.__int__, TENSOR.__float__, TENSOR.__index__}


class Crossings(TorchFunctionMode):
    """Notes what brings numbers from the host to the device, or waits to have some from there."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in BRING | WAIT:
            self.seen.append(function)
        return function(*arguments, **(options or {}))


@pytest.fixture
def model():
    with torch.device("meta"):
        model = DeepSeekVL(preset("tiny")).eval()
    model.compute_dtype = torch.bfloat16
    return model


def test_crossings_are_noticed():
    x = torch.ones(3)
    with Crossings() as crossings:
        x.new_tensor([1.0, 2.0, 3.0])
        torch.tensor([1.0])
        if x.sum() > 1:
            x.tolist()
    assert crossings.seen == [TENSOR.new_tensor, torch.tensor, TENSOR.__bool__, TENSOR.tolist]


@torch.inference_mode()
def test_an_image_is_encoded_on_the_device_alone(model):
    pixels = torch.rand(1, 3, model.config.image_size, model.config.image_size, device="meta")
    with Crossings() as crossings:
        model.encode_images(pixels)
    assert not crossings.seen


@torch.inference_mode()
def test_a_token_is_decoded_on_the_device_alone(model):
    cache = KVCache(model.config.language, 2, 8, torch.bfloat16, "meta")
    tokens = torch.zeros(2, dtype=torch.int64, device="meta")
    operands = model.language.operands(torch.bfloat16)
    with Crossings() as crossings:
        model.lm_head(model.decode(tokens, operands, cache.keys, cache.values, cache.lengths))
        cache.advance()
    assert not crossings.seen


def test_channels_are_normalised_each_by_its_own():
    pixels, mean, std = torch.rand(2, 3, 4, 5), (0.1, 0.2, 0.3), (0.5, 2.0, 0.7)
    wanted = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    # A GPU multiplies by the reciprocal of a number that it is to divide by.
    torch.testing.assert_close(normalized(pixels.to(DEVICE), mean, std).cpu(), wanted, rtol=2e-7, atol=1e-7)
    assert normalized(pixels.bfloat16(), mean, std).dtype == torch.float32


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@torch.inference_mode()
def test_an_encoder_is_a_graph():
    model = DeepSeekVL(preset("tiny"))
    init_weights(model, seed=0)
    model.eval().to(DEVICE).compute_dtype = torch.bfloat16
    encode = CudaGraphs(model.encode_images)
    for _ in range(3):
        pixels = torch.rand(2, 3, model.config.image_size, model.config.image_size, device=DEVICE)
        wanted = model.encode_images(pixels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = encode(pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got, wanted)
