"""Carries out a run: stage by stage, step by step, from wherever it stands."""

import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from vlcore.checkpoint import replacing_directory, save_pretrained
from vlcore.data import Encoder, Loader, Portion, Sampler
from vlcore.layouts import files
from vlcore.models.deepseek_vl import DeepSeekVL
from vlcore.processing import Batch, Processor
from vlcore.train.config import Stage, TrainConfig
from vlcore.train.description import describe, fingerprint
from vlcore.train.interrupts import Interrupts
from vlcore.train.lock import locked
from vlcore.train.metrics import MetricsLog, StepRecord, count
from vlcore.train.optimizer import make_optimizer, scale_and_clip, set_learning_rate
from vlcore.train.plot import check_matplotlib, plot_loss
from vlcore.train.progress import Bar
from vlcore.train.rejections import RejectionLog
from vlcore.train.result import StageResult, TrainingInterrupted, TrainingStopped, TrainResult
from vlcore.train.schedule import learning_rate
from vlcore.train.start import (
    BAD_SAMPLES,
    CHECKPOINTS,
    METRICS,
    PLOT,
    check,
    check_alone,
    clear_leftovers,
    load_model,
    load_processor,
    place,
    remove_run,
    training_mode,
)
from vlcore.train.state import (
    Progress,
    checkpoints,
    load_checkpoint,
    load_optimizer,
    naming_an_older,
    save_checkpoint,
)

# Where the last tenth of a stage begins, whose mean loss is the stage's.
TAIL = 0.9
MOST_NAMED = 20


def train(config: TrainConfig, model: DeepSeekVL | None = None, processor: Processor | None = None) -> TrainResult:
    """Train a model through its stages, or go on where an earlier call with the same output_dir stopped.

    It is one process on one device.

    Args:
        config: the run.
        model: trained in place, its weights made float32, where it is unless config.device says otherwise; by default
            the one that config.model describes. A run that goes on has its weights from the checkpoint.
        processor: by default the one that config.processor describes.

    Raises:
        ValueError: the configuration cannot be carried out, this is one of several processes, or the checkpoint or a
            list in output_dir is damaged or of another run, or another run is using it.
        TrainingStopped: too many bad samples, or too many steps in a row that were not finite.
        TrainingInterrupted: SIGINT or SIGTERM came, in the main thread; the step was finished and a checkpoint written.
        OSError: output_dir cannot be written.
    """
    check_alone()
    if config.plot:
        check_matplotlib()
    with locked(Path(config.output_dir)):
        is_given = model is not None
        model = load_model(config) if model is None else place(model, config)
        # What is handed over may be what an earlier call, which was stopped, has trained already.
        weights = None if is_given else fingerprint(model)
        processor = processor or load_processor(config)
        check(config, model, processor)
        with training_mode(model, config):
            return Trainer(config, model, processor, weights).run()


class Trainer:
    """One run. `progress` says where it stands; everything else follows from the configuration and the weights."""

    def __init__(self, config: TrainConfig, model: DeepSeekVL, processor: Processor, weights: str | None):
        self.config, self.model, self.processor = config, model, processor
        self.output_dir = Path(config.output_dir)
        self.folder = self.output_dir / CHECKPOINTS
        self.device = next(model.parameters()).device
        self.progress = Progress()
        self.interrupts = Interrupts()
        self.resumed_step: int | None = None
        self.described = describe(config, model.config, processor, weights)
        if not config.resume:
            remove_run(self.output_dir)
        clear_leftovers(self.output_dir)
        if saved := checkpoints(self.folder):
            with naming_an_older(saved[-1]):
                self.progress = load_checkpoint(saved[-1], self.described, model)
            self.resumed_step = self.progress.global_step
        self.metrics = MetricsLog(self.output_dir / METRICS, config.log_every, self.progress.global_step)
        self.rejections = RejectionLog(self.output_dir / BAD_SAMPLES, config.max_bad_samples)

    def run(self) -> TrainResult:
        try:
            with Bar() as bar, self.interrupts:
                while self.progress.stage < len(self.config.stages):
                    self._run_stage(self.config.stages[self.progress.stage], bar)
        except BaseException:
            with suppress(OSError):  # what stopped the run is worth more than that its last steps cannot be written
                self._report()
            raise
        self._report()
        if self.config.save_model:
            self._save_model()
        self.model.eval()
        return TrainResult(self.model, self.processor, tuple(self.progress.results), self.output_dir)

    def _report(self) -> None:
        """Write down the steps that are not yet, and draw all."""
        if self.progress.results:
            self.metrics.flush(self.progress.results[-1])
        if self.config.plot:
            plot_loss(self.metrics.path, self.output_dir / PLOT)

    def _save_model(self) -> None:
        """Weights and processor together, or neither."""
        target = self.output_dir / "model"
        try:
            with replacing_directory(target, replaced=("*.safetensors", files.INDEX)) as fresh:
                save_pretrained(self.model, fresh, layout="transformers")
                self.processor.save_pretrained(fresh)
        except OSError as error:
            raise OSError(f"{target} could not be written and is as it was: {error}") from error

    def _run_stage(self, stage: Stage, bar: Bar) -> None:
        """Train the rest of the current stage, tell on_stage_end, and move on to the next."""
        progress = self.progress
        if len(progress.results) <= progress.stage:
            progress.results.append(StageResult(stage.name))
        total = progress.results[-1]
        optimizer = self._begin(stage)
        bar.begin(stage, progress.step)
        portions = self._loader(stage).portions(progress.step)
        while progress.step < stage.steps:
            record = self._step(stage, optimizer, portions)
            progress.step, progress.global_step = progress.step + 1, progress.global_step + 1
            count(total, record, in_tail=progress.step > TAIL * stage.steps)
            self.metrics.add(record, total)
            bar.update(record)
            self._watch(record)
            self.rejections.check(total.bad_samples, total.bad_samples + total.samples)
            is_due = progress.global_step % (self.config.checkpoint_every or math.inf) == 0
            if self.interrupts.received or (is_due and progress.step < stage.steps):
                self._save(optimizer)
        self._end(stage, optimizer)

    def _begin(self, stage: Stage) -> torch.optim.Optimizer:
        """Freeze what the stage does not train, and make its optimizer, or bring it back."""
        parts = self.model.parts()
        for name, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(name in stage.trains)
        optimizer = make_optimizer(stage, [p for name in parts if name in stage.trains for p in parts[name]])
        if self.progress.step:
            newest = checkpoints(self.folder)[-1]
            with naming_an_older(newest):
                load_optimizer(newest, optimizer, self.model)
        self.model.train()
        return optimizer

    def _loader(self, stage: Stage) -> Loader:
        sampler = Sampler(
            stage.mixture,
            steps=stage.steps,
            samples_per_step=stage.samples_per_step,
            seed=self.config.seed,
            stage=self.progress.stage,
            text_ratio=stage.text_ratio,
            modality_warmup=stage.modality_warmup,
            grouping=stage.grouping,
        )
        encoder = Encoder(
            processor=self.processor,
            sequence_length=stage.sequence_length,
            supervise=stage.supervise,
            overlong=stage.overlong,
        )
        return Loader(
            sampler,
            encoder,
            micro_batch_size=stage.micro_batch_size,
            packing=stage.packing,
            samples_per_sequence=stage.samples_per_sequence,
            num_workers=self.config.num_workers,
        )

    def _step(self, stage: Stage, optimizer: torch.optim.Optimizer, portions: Iterator[Portion]) -> StepRecord:
        """One global step: the gradient of the mean loss over all its supervised tokens, clipped, and applied."""
        start, step = perf_counter(), self.progress.step
        rate = learning_rate(stage, step)
        record = StepRecord(step=step, global_step=self.progress.global_step, learning_rate=rate)
        losses: list[tuple[Tensor, tuple[str, ...]]] = []
        is_last = False
        while not is_last:
            portion = self._next(portions, record)
            losses += [(self._accumulate(batch), batch.sample_ids) for batch in portion.batches]
            is_last = portion.is_last
        record.loss = float(torch.stack([loss for loss, _ in losses]).sum())
        # Sums first, and one division at the end: the count is the whole step's, which is known only now.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        record.grad_norm = scale_and_clip(parameters, record.supervised_tokens, stage.clip_norm)
        record.skipped = not (math.isfinite(record.loss) and math.isfinite(record.grad_norm))
        if not record.skipped:
            set_learning_rate(optimizer, rate)
            optimizer.step()
        else:
            bad = [ids for loss, ids in losses if not torch.isfinite(loss)] or [ids for _, ids in losses]
            record.suspects = tuple(name for ids in bad for name in ids)
        optimizer.zero_grad(set_to_none=True)
        record.seconds = perf_counter() - start
        return record

    def _next(self, portions: Iterator[Portion], record: StepRecord) -> Portion:
        """The next portion, counted."""
        start = perf_counter()
        portion = next(portions)
        record.data_seconds += perf_counter() - start
        record.modality = portion.modality
        record.samples += portion.samples
        record.tokens += portion.tokens
        record.bad_samples += len(portion.rejections) - portion.overlong_samples
        record.overlong_samples += portion.overlong_samples
        record.cut_tokens += portion.cut_tokens
        record.images += sum(batch.num_images for batch in portion.batches)
        record.supervised_tokens += sum(batch.num_supervised for batch in portion.batches)
        self.rejections.add(portion.rejections)
        if portion.failure:
            raise TrainingStopped(f"{portion.failure}. {self.rejections.path} lists the bad samples.")
        return portion

    def _accumulate(self, batch: Batch) -> Tensor:
        """Add the gradients of a batch's summed loss, and return that."""
        batch = batch.to(self.device, non_blocking=True)
        loss = self.model(
            batch.input_ids,
            batch.pixels,
            batch.labels,
            positions=batch.positions,
            attention_mask=batch.attention_mask,
            cu_seqlens=batch.cu_seqlens,
            loss_reduction="sum",
        ).loss
        loss.backward()
        return loss.detach()

    def _watch(self, record: StepRecord) -> None:
        """Stop after too many steps of a modality in a row that were not finite."""
        bad_steps = self.progress.bad_steps
        bad_steps[record.modality] = bad_steps.get(record.modality, 0) + 1 if record.skipped else 0
        if bad_steps[record.modality] >= self.config.max_bad_steps:
            names = record.suspects
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            raise TrainingStopped(
                f"{bad_steps[record.modality]} {record.modality} steps in a row had a loss or gradient that was not "
                f"finite (max_bad_steps), the last one step {record.step} with loss {record.loss} and gradient norm "
                f"{record.grad_norm}, "
                f"on samples {', '.join(names[:MOST_NAMED])}{more}."
            )

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write a checkpoint; where a signal came before it was written, it is the last."""
        self.metrics.flush(self.progress.results[-1])
        given = self.progress, self.described, self.model, self.processor, optimizer
        saved = save_checkpoint(self.folder, *given, keep=self.config.keep)
        if self.interrupts.received:
            raise TrainingInterrupted(self.interrupts.received, saved)

    def _end(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        """Close the stage. What on_stage_end fails at is not lost: the last step is saved before it is called."""
        progress = self.progress
        if self.config.on_stage_end is not None:
            if self.resumed_step != progress.global_step:
                self._save(optimizer)
            self.model.eval()
            # Without the compiler, which would take every cache of a generation for a case of its own.
            eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
            with eager, self.interrupts.suspended():
                self.config.on_stage_end(stage, self.model, self.processor, progress.results[-1])
        progress.stage, progress.step = progress.stage + 1, 0
        self._save(None)
