"""One graph for every length: what "auto" takes in it does not depend on sizes that are symbols."""

import pytest
import torch
import torch._dynamo.testing
from checkpoints import siglip_only, telling_model
from conftest import DEVICE
from operators import random

from vlcore import native, ops
from vlcore.config import preset
from vlcore.ops.dispatch import known

LENGTH = torch.export.Dim("length", min=2, max=4096)
WEIGHT, BIAS = random(96, 64), random(96)
QUANTIZED = ops.quantize_weight(WEIGHT, 8, 32)
LAYERS = [part for shape in ((48, 64), (48, 64), (32, 96)) for part in (random(*shape), random(shape[0]))]


def heads(x):
    return x.unflatten(-1, (4, 16))[None]


FUNCTIONS = {
    "linear": lambda x: ops.linear(x, WEIGHT, BIAS, activation="gelu"),
    "quantized_linear": lambda x: ops.quantized_linear(x, QUANTIZED, BIAS),
    "swiglu": lambda x: ops.swiglu(x, x),
    "layer_norm": lambda x: ops.layer_norm(x, x[0], x[1]),
    "rms_norm": lambda x: ops.rms_norm(x, x[0]),
    "add_rms_norm": lambda x: ops.add_rms_norm(x, x, x[0])[1],
    "attention": lambda x: ops.attention(heads(x), heads(x), heads(x), causal=True),
    "rope_attention": lambda x: ops.rope_attention(*[heads(x)] * 3, torch.arange(x.shape[0], device=x.device)[None]),
    "hybrid_adaptor": lambda x: ops.hybrid_adaptor(x, x, *LAYERS),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, WEIGHT, torch.arange(x.shape[0], device=x.device) % 9
    ),
}


class Module(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.scale = torch.nn.Parameter(torch.ones((), device=DEVICE))

    def forward(self, x):
        return FUNCTIONS[self.name](self.scale * x)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("level", range(native.level + 1))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_exported_takes_any_length(monkeypatch, name, level, records):
    """On both sides of what an operator would choose by."""
    monkeypatch.setattr(native, "level", level)
    module = Module(name).requires_grad_(records)
    with torch.set_grad_enabled(records):
        exported = torch.export.export(module, (random(33, 64),), dynamic_shapes={"x": {0: LENGTH}}).module()
        for length in (2, 16, 17, 1030):
            x = random(length, 64)
            torch.testing.assert_close(exported(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_serves_every_length(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(FUNCTIONS[name], backend=counter, dynamic=True, fullgraph=True)
    for length in (3, 16, 17, 300, 1030):
        compiled(random(length, 64))
    assert counter.frame_count == 1


def test_sizes_that_are_numbers_are_asked():
    seen = []

    def function(x):
        seen.append(known(x.shape[0] >= 10))
        return x + 1

    for size in (3, 30):
        torch.compile(function, backend="eager", dynamic=False)(torch.zeros(size))
    assert seen == [False, True] and known(True) and not known(False)


@pytest.mark.skipif(native.cpp is None, reason="vlcore was built without its C++ extension")
def test_a_graph_says_what_it_was_made_for():
    x = random(33, 64).cpu()
    exported = torch.export.export(Module("rms_norm").cpu(), (x,)).module()
    with pytest.raises(ValueError, match=r"rms_norm_forward: the C\+\+ kernels, .* and not in torch.float64"):
        exported(x.double())
    if DEVICE != "cpu":
        with pytest.raises(ValueError, match="vlcore::rms_norm_forward is to run on 'cpp', as when its graph was made"):
            exported(x.to(DEVICE))


def test_the_model_is_exported_for_any_length():
    model = telling_model(siglip_only(preset("tiny"))).to(DEVICE)
    ids = torch.randint(4, 512, (1, 40), device=DEVICE)
    length = torch.export.Dim("length", min=2, max=500)
    exported = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": {1: length}}).module()
    for size in (3, 200):
        ids = torch.randint(4, 512, (1, size), device=DEVICE)
        torch.testing.assert_close(exported(ids).logits, model(ids).logits)
