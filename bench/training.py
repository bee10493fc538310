"""One optimisation step of the demo's third stage, everything trained, beside our own torch references."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from vlcore.bench.models import EndToEnd, Run, random_model
from vlcore.bench.peers import OURS, TORCH_BACKEND, torch_backend
from vlcore.config import VLConfig, preset
from vlcore.models import DeepSeekVL
from vlcore.processing.segments import IGNORE_INDEX
from vlcore.train.optimizer import scale_and_clip

SAMPLES, TEXT, ANSWER = 32, 40, 12


def train(dtype: torch.dtype, device: str, compiled: bool) -> Iterator[EndToEnd]:
    """Forward, backward, clipping and AdamW on 32 questions about an image each; weights in float32."""
    config = preset("demo")
    model = random_model(config, torch.float32, device).train()
    model.compute_dtype = dtype
    exact = copy.deepcopy(model).double()
    exact.compute_dtype = torch.float64
    batch = _batch(config, device)
    yield EndToEnd(
        what="training step, demo",
        shape=f"{SAMPLES} × (image + {TEXT} tokens)",
        ours={OURS: _step(model, batch)},
        peers={TORCH_BACKEND: _by_references(_step(copy.deepcopy(model), batch))},
        checks=[(_gradient(model, batch), _by_references(_gradient(model, batch)), _gradient(exact, batch))],
        trains=True,
    )


def _batch(config: VLConfig, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids (32, T), pixels, and labels at the end of each row."""
    text = torch.randint(config.image_token_id + 1, config.language.vocab_size, (SAMPLES, TEXT))
    images = torch.full((SAMPLES, config.num_image_tokens), config.image_token_id)
    ids = torch.cat((images, text), 1)
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORE_INDEX
    pixels = torch.rand(SAMPLES, 3, config.image_size, config.image_size)
    return ids.to(device), pixels.to(device), labels.to(device)


def _gradient(model: DeepSeekVL, batch: tuple[Tensor, Tensor, Tensor]) -> Run:
    """The gradient of the mean loss for every parameter, in one vector."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        model(*batch).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    return run


def _step(model: DeepSeekVL, batch: tuple[Tensor, Tensor, Tensor]) -> Run:
    # A step of length 0 costs the same, and leaves the next turn the same work.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def run() -> Tensor:
        loss = model(*batch, loss_reduction="sum").loss
        loss.backward()
        scale_and_clip(model.parameters(), SAMPLES * ANSWER, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def _by_references(run: Run) -> Run:
    def run_by_references() -> Tensor:
        with torch_backend():
            return run()

    return run_by_references
