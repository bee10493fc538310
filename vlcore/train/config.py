"""A training run as data: its stages, and everything else that decides what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlcore import overrides
from vlcore.config import VLConfig
from vlcore.data import Mixture

Part = Literal["sam", "siglip", "adaptor", "language"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training. What the paper leaves open has our default here, and is marked "ours".

    Attributes:
        name: names the stage in metrics and messages.
        trains: the parts that learn, of "sam", "siglip", "adaptor" (with the two stride-2 convolutions) and "language".
        mixture: what is trained on.
        steps: global steps.
        learning_rate: its peak.
        schedule: "cosine" falls to min_ratio of the peak; "step" multiplies it by 0.316 at 80 % and by 0.1 at 90 % of
            the steps (ours, DeepSeek-LLM's); "constant" holds it. All begin with a linear warm-up.
        warmup_steps: steps of the learning rate's warm-up. A stage of fewer steps, such as a trial of the paper's,
            warms up over all of them and reaches the peak in its last.
        min_ratio: where the cosine ends, relative to the peak (ours).
        batch_size: sequences of a global step, over all its micro-batches.
        micro_batch_size: sequences of one forward and backward; gradients are accumulated over the micro-batches.
        sequence_length: tokens that a sequence may have, images included.
        packing: several samples share a sequence, and attention does not cross from one to another.
        samples_per_sequence: with packing, a step draws batch_size * samples_per_sequence samples (ours). The number is
            fixed so that what a step draws depends on the step alone; set it near sequence_length / mean tokens of a
            sample. Micro-batches hold at most micro_batch_size * sequence_length tokens whatever it is.
        overlong: what happens to a sample over sequence_length (ours): "skip" replaces it by another; "truncate" cuts a
            document's text at the end, keeps the whole turns of a conversation up to the last answer that fits, and
            skips what has none or would lose its images. What is skipped is counted and listed in bad_samples.jsonl,
            but is no bad sample; tokens cut are counted.
        supervise: "text" learns all text; "answers" only the answers of conversations and the token that ends them.
        text_ratio: share of text, in steps when grouping and otherwise in samples; None takes it from the weights.
        modality_warmup: fraction of the steps over which the share of text falls linearly from 1 to its ratio; the
            paper does it in stage 2, and 0.1 is ours.
        grouping: every global step is all text or all multimodal.
        betas, eps, weight_decay: AdamW's; eps is ours. Decay applies to matrices only.
        clip_norm: the gradient's norm is brought down to it.

    Raises:
        ValueError: a number out of range, a word that is none of those above, or a value of another type.
    """

    name: str
    trains: tuple[Part, ...]
    mixture: Mixture
    steps: int
    learning_rate: float
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_steps: int = 0
    min_ratio: float = 0.1
    batch_size: int = 256
    micro_batch_size: int = 1
    sequence_length: int = 4096
    packing: bool = False
    samples_per_sequence: int = 4
    overlong: Literal["skip", "truncate"] = "skip"
    supervise: Literal["text", "answers"] = "text"
    text_ratio: float | None = None
    modality_warmup: float = 0.0
    grouping: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        where = f"Stage {self.name!r}"
        overrides.settle(where, self)
        if not self.trains:
            raise ValueError(f"{where}: trains {self.trains} must name one or more of {get_args(Part)}.")
        for field in ("steps", "batch_size", "micro_batch_size", "sequence_length", "samples_per_sequence"):
            _check(where, field, getattr(self, field), getattr(self, field) >= 1, "at least 1")
        for field in ("learning_rate", "eps", "clip_norm"):
            _check(where, field, getattr(self, field), 0 < getattr(self, field) < float("inf"), "finite and over 0")
        _check(where, "warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        decay = self.weight_decay
        _check(where, "weight_decay", decay, 0 <= decay < float("inf"), "finite and 0 or more")
        for field, share in {
            "min_ratio": self.min_ratio,
            "modality_warmup": self.modality_warmup,
            "text_ratio": self.text_ratio or 0.0,
            "betas": min(self.betas) if all(beta < 1 for beta in self.betas) else -1,
        }.items():
            _check(where, field, getattr(self, field), 0 <= share <= 1, "in 0..1")

    @property
    def samples_per_step(self) -> int:
        """Samples that a global step draws."""
        return self.batch_size * (self.samples_per_sequence if self.packing else 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run.

    Attributes:
        model: a configuration or a preset's name to start from fresh weights, or a model directory to start from its
            weights.
        processor: a directory that `Processor.from_pretrained` takes; None takes it from the model directory.
        stages: trained one after another. Each begins with a fresh optimizer (ours).
        output_dir: where checkpoints, metrics.jsonl, bad_samples.jsonl, loss.png and the model are written; one run at
            a time may use it.
        seed: decides the fresh weights and every draw of data.
        device: where the model is trained, such as "cuda:1" or "cpu". None takes a GPU if there is one, and leaves a
            model that is handed to `train` where it is.
        precision: "fp32" or "bf16", of the computation; weights and optimizer are float32 in both.
        compile: compile the model's repeated blocks with torch.compile; a string names the backend.
        activation_checkpointing: recompute activations in the backward instead of keeping them.
        num_workers: processes that load data; 0 loads it in the training process.
        checkpoint_every: steps between checkpoints, besides those at the ends of stages; None makes only those. A run
            that is killed loses as many steps at most; one that SIGTERM or Ctrl-C reaches writes a checkpoint first.
        keep: how many checkpoints are kept.
        resume: go on from the last checkpoint in output_dir, if there is one and it is of this run: of the same
            settings, starting weights and rows of data. Images are not looked at. False deletes what an earlier run
            left.
        log_every: steps that one line of metrics.jsonl sums up.
        plot: draw loss.png (needs matplotlib).
        save_model: write the final model, with its processor, to output_dir/model in the transformers layout.
        max_bad_steps: steps in a row with a loss or gradient that is not finite, after which the run stops. Text,
            multimodal and mixed steps are counted apart: what only images break is not forgotten at the next text.
        max_bad_samples: the part of the samples drawn that may be bad, above which the run stops. Samples that are only
            too long count neither as bad nor as drawn.
        on_stage_end: called as on_stage_end(stage, model, processor, summary) when a stage is done, with the model in
            eval mode and `summary` the StageResult. It is called before the stage counts as done in a checkpoint.

    Raises:
        ValueError: no stages, a number out of range, a word that is none of those above, or a value of another type.
    """

    model: VLConfig | str | Path
    processor: str | Path | None = None
    stages: tuple[Stage, ...]
    output_dir: str | Path
    seed: int = 0
    device: str | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool | str = False
    activation_checkpointing: bool = False
    num_workers: int = 0
    checkpoint_every: int | None = 1000
    keep: int = 2
    resume: bool = True
    log_every: int = 1
    plot: bool = True
    save_model: bool = True
    max_bad_steps: int = 10
    max_bad_samples: float = 0.05
    on_stage_end: Callable[..., Any] | None = None

    def __post_init__(self):
        overrides.settle("TrainConfig", self)
        if not self.stages:
            raise ValueError("TrainConfig: there are no stages.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"TrainConfig: each stage needs a name of its own, given {names}.")
        for field in ("keep", "log_every", "max_bad_steps"):
            _check("TrainConfig", field, getattr(self, field), getattr(self, field) >= 1, "at least 1")
        every = self.checkpoint_every
        _check("TrainConfig", "checkpoint_every", every, every is None or every >= 1, "at least 1, or None")
        _check("TrainConfig", "num_workers", self.num_workers, self.num_workers >= 0, "0 or more")
        _check("TrainConfig", "seed", self.seed, 0 <= self.seed < 2**63, "in 0..2**63 - 1")
        _check("TrainConfig", "max_bad_samples", self.max_bad_samples, 0 <= self.max_bad_samples <= 1, "in 0..1")


def _check(where: str, field: str, value: Any, holds: bool, needed: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {field} is {value!r}; it must be {needed}.")
