"""The learning rate of each step of a stage."""

from math import cos, pi

from vlcore.train.config import Stage

# DeepSeek-LLM's multi-step schedule (arXiv 2401.02954, section 2.3).
STEPS_DOWN = ((0.9, 0.1), (0.8, 0.316))


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate that step `step` of 0..stage.steps - 1 is taken with."""
    warmup = min(stage.warmup_steps, stage.steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    return stage.learning_rate * _ratio(stage, step)


def _ratio(stage: Stage, step: int) -> float:
    if stage.schedule == "cosine":
        progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
        return stage.min_ratio + (1 - stage.min_ratio) * (1 + cos(pi * progress)) / 2
    if stage.schedule == "step":
        return next((ratio for start, ratio in STEPS_DOWN if step >= start * stage.steps), 1.0)
    return 1.0
