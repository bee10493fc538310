"""What a run hands back, and the errors that end one early."""

import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vlcore.models.deepseek_vl import DeepSeekVL
from vlcore.processing import Processor


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many bad samples, or too many steps in a row that were not finite."""


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT came, the step was finished and a checkpoint written, from which the same run goes on.

    Args:
        number: the signal.
        checkpoint: what was written.
    """

    def __init__(self, number: signal.Signals, checkpoint: Path):
        super().__init__(f"stopped by {number.name} behind {checkpoint}, from which the same run goes on.")
        self.number = number


@dataclass
class StageResult:
    """What a stage has done so far, over all the runs that it took.

    Attributes:
        name: the stage's.
        steps: global steps taken, the skipped ones included.
        seconds: wall time, waiting for data included; checkpoints and on_stage_end are not.
        supervised_tokens: that the loss was taken over.
        images: that were trained on.
        skipped_steps: steps with a loss or gradient that was not finite, after which no weight changed.
        bad_samples: draws that were replaced because the sample could not be used.
        overlong_samples: draws that were replaced because the sample was too long.
        cut_tokens: cut off the ends of documents and conversations that were too long.
        samples_by_source, tokens_by_source: trained on; tokens count images' tokens, not padding.
        tail_loss, tail_tokens: summed over the last tenth of the steps; their ratio is `loss`.
    """

    name: str
    steps: int = 0
    seconds: float = 0.0
    supervised_tokens: int = 0
    images: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    overlong_samples: int = 0
    cut_tokens: int = 0
    samples_by_source: Counter[str] = field(default_factory=Counter)
    tokens_by_source: Counter[str] = field(default_factory=Counter)
    tail_loss: float = 0.0
    tail_tokens: int = 0

    @property
    def samples(self) -> int:
        return sum(self.samples_by_source.values())

    @property
    def tokens(self) -> int:
        return sum(self.tokens_by_source.values())

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def loss(self) -> float:
        """Mean loss of the last tenth of the steps, a supervised token, in nats; nan before them."""
        return self.tail_loss / self.tail_tokens if self.tail_tokens else float("nan")


@dataclass(frozen=True)
class TrainResult:
    """The trained model and how it came about.

    Attributes:
        model: in eval mode, with float32 weights.
        processor: tokenizer, chat template and image settings.
        stages: what each did, in order.
        output_dir: where everything was written.
    """

    model: DeepSeekVL
    processor: Processor
    stages: tuple[StageResult, ...]
    output_dir: Path
