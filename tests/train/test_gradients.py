"""The gradient of a global step: of the mean over all its supervised tokens, in any number of micro-batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlcore.config import preset
from vlcore.data import Encoder, Sampler
from vlcore.models import DeepSeekVL, init_weights
from vlcore.train import trainer
from vlcore.train.optimizer import make_optimizer, scale_and_clip

ALL = ("adaptor", "language", "siglip", "sam")
BOTH = {"instructions": 1, "articles": 1}


class Kept(torch.optim.SGD):
    """Keeps the gradients that it is asked to apply."""

    def step(self, closure=None):
        Kept.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


@pytest.fixture
def gradients(run, monkeypatch):
    monkeypatch.setattr(trainer, "make_optimizer", lambda stage, parameters: Kept(parameters, lr=1.0))

    def gradients(stage):
        model = fresh()
        result = run(replace(stage, steps=1, clip_norm=1e9), model=model, resume=False)
        return Kept.gradients, result.stages[0].loss

    return gradients


def fresh():
    model = DeepSeekVL(preset("tiny"))
    init_weights(model, 3)
    return model


def assert_close(one, two):
    (grads, loss), (other_grads, other_loss) = one, two
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert len(grads) == len(other_grads)
    largest = max(grad.abs().max() for grad in grads)
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=float(largest) * 1e-6)


@pytest.fixture
def mixed(stage):
    """Five samples of both kinds and of quite different lengths; texts are learned whole, so that counts differ."""
    return stage(sources=BOTH, trains=ALL, batch_size=5, micro_batch_size=5, grouping=False)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(gradients, mixed, micro_batch_size):
    assert_close(gradients(mixed), gradients(replace(mixed, micro_batch_size=micro_batch_size)))


def test_packed_gradients_are_those_of_samples_alone(gradients, mixed):
    alone = replace(mixed, batch_size=6, micro_batch_size=1)
    packed = replace(mixed, batch_size=2, samples_per_sequence=3, packing=True, micro_batch_size=2, sequence_length=160)
    assert_close(gradients(alone), gradients(packed))
    assert_close(gradients(alone), gradients(replace(packed, micro_batch_size=1)))


def test_the_gradient_is_that_of_the_mean_over_the_supervised_tokens(gradients, mixed, processor):
    grads, loss = gradients(mixed)
    sampler = Sampler(mixed.mixture, steps=1, samples_per_step=5, seed=1, grouping=False)
    encoder = Encoder(processor=processor, sequence_length=128)
    model = fresh().train()
    total, count = torch.zeros(()), 0
    for draw in sampler.draws(0):
        encoded, _ = encoder(mixed.mixture.entries[draw.entry].source[draw.index])
        logits = model(encoded.input_ids[None], processor.pixels(encoded.images), return_logits=True).logits[0]
        total = total + F.cross_entropy(logits[:-1], encoded.labels[1:], ignore_index=-100, reduction="sum")
        count += int((encoded.labels[1:] != -100).sum())
    (total / count).backward()
    parts = model.parts()
    expected = [p.grad for part in parts if part in ALL for p in parts[part]]
    assert_close((grads, loss), (expected, float(total.detach() / count)))


def test_gradients_are_divided_and_clipped_in_place():
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]) * 10, torch.tensor([0, 4.0, 0]) * 10
    assert scale_and_clip(parameters, 10, 100.0) == pytest.approx(5)
    assert parameters[0].grad[0] == pytest.approx(3)
    assert scale_and_clip(parameters, 1, 0.5) == pytest.approx(5)
    assert parameters[1].grad[1] == pytest.approx(0.4) and parameters[2].grad is None
    assert scale_and_clip([parameters[2]], 1, 0.5) == 0.0


def test_gradients_that_are_not_finite_are_left_alone():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([float("inf"), 1.0])
    assert scale_and_clip([parameter], 2, 1.0) == float("inf")
    assert parameter.grad[1] == 1.0


def test_decay_is_for_matrices_only(stage):
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = make_optimizer(stage(weight_decay=0.1), [matrix, vector]).param_groups
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == {
        id(matrix): 0.1,
        id(vector): 0.0,
    }
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["eps"] == 1e-8
