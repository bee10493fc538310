"""The command `vlcore train FILE.py:FUNCTION [key=value ...]`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlcore import overrides
from vlcore.train.config import Stage, TrainConfig
from vlcore.train.result import TrainingInterrupted, TrainingStopped
from vlcore.train.trainer import train


def run_file(spec: str, changes: Sequence[str] = ()) -> int:
    """Train what the function `spec` ("FILE.py:FUNCTION") describes, with fields changed by "key=value".

    Returns:
        0 when the run is done, 1 when it was stopped, and 128 and the signal's number when a signal stopped it; why is
        told on standard error.

    Raises:
        ValueError: `spec` names no function that returns a TrainConfig, a change is refused (the nearest key, or the
            type needed, is named), the function itself failed (its line is named), or the run cannot be carried out.
        OSError: something cannot be read or written.
        RuntimeError: on_stage_end failed; from what it raised, whose traceback tells where.
    """
    config = overrides.load(spec)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{spec} returned a {type(config).__name__}; it must return a TrainConfig.")
    try:
        config = overrides.apply(config, changes)
        if config.on_stage_end is not None:
            config = replace(config, on_stage_end=_apart(config.on_stage_end))
        result = train(config)
    except (TrainingStopped, TrainingInterrupted) as error:
        print(f"vlcore train: {error}", file=sys.stderr)
        return 128 + error.number if isinstance(error, TrainingInterrupted) else 1
    for stage in result.stages:
        print(
            f"{stage.name}: {stage.steps} steps in {stage.seconds:.0f} s, {stage.samples} samples, "
            f"{stage.tokens} tokens, loss {stage.loss:.4f}, {stage.skipped_steps} steps skipped, "
            f"{stage.bad_samples} bad samples, {stage.overlong_samples} too long"
        )
    print(f"written to {result.output_dir}")
    return 0


def _apart(on_stage_end: Callable[..., Any]) -> Callable[..., Any]:
    """The callback, whose errors are not taken for those of the configuration, which are told without a traceback."""

    def call(stage: Stage, *others: Any) -> None:
        try:
            on_stage_end(stage, *others)
        except Exception as error:
            raise RuntimeError(f"on_stage_end failed after stage {stage.name!r}: {error}") from error

    return call
