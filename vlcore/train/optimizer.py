"""AdamW over the parts that a stage trains, and the one place where gradients are scaled, measured and clipped."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlcore.train.config import Stage


def make_optimizer(stage: Stage, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with the stage's settings; weight decay, if any, applies to matrices and not to gains and biases."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=stage.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def scale_and_clip(parameters: Iterable[nn.Parameter], divisor: float, clip_norm: float) -> float:
    """Divide gradients by `divisor`, then bring their common norm down to `clip_norm`; in place, in one pass.

    Returns:
        The norm after the division and before the clipping. Where it is not finite, the gradients are left alone.
    """
    grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return 0.0
    norm = float(torch.nn.utils.get_total_norm(grads)) / divisor
    if norm < float("inf"):
        torch._foreach_mul_(grads, min(1.0, clip_norm / max(norm, 1e-12)) / divisor)
    return norm
