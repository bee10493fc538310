"""Batches of a stage, step by step: drawn, encoded and collated, in worker processes where asked."""

import atexit
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import Event
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vlcore.data.encode import Encoder
from vlcore.data.mixture import Augment
from vlcore.data.sample import BadSample, Overlong, Sample, Source
from vlcore.data.sampler import Draw, Sampler
from vlcore.processing import Batch, Encoded, collate, pack

# Bad samples in a row at one place of a batch, after which the source counts as broken.
MAX_ATTEMPTS = 20
# The same for samples that are too long: where nine of ten are, one place of a billion meets as many.
MAX_OVERLONG = 200


@dataclass(frozen=True)
class Rejection:
    """A sample that was replaced by another one, and why."""

    source: str
    sample_id: str
    reason: str


@dataclass
class Portion:
    """What a step is worked off in: the samples of one micro-batch.

    Attributes:
        step: the global step.
        is_last: no portion of the step follows.
        modality: of the whole step: "text", "multimodal" or "mixed".
        batches: one; when packing, more where the samples exceed the micro-batch's tokens.
        samples, tokens: drawn, by source. Tokens count images' tokens, not padding.
        cut_tokens: cut off the ends of documents and conversations that were too long.
        rejections: bad samples met on the way, and those that were too long.
        overlong_samples: how many of the rejections are the latter.
        failure: why no batch could be made, or None.
    """

    step: int
    is_last: bool
    modality: str
    batches: list[Batch] = field(default_factory=list)
    samples: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    cut_tokens: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    overlong_samples: int = 0
    failure: str | None = None

    def pin_memory(self) -> "Portion":
        """The same portion with its batches in page-locked memory; torch's DataLoader calls it."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class Loader:
    """The portions of a stage from any step on. What they hold depends on neither workers nor where it began.

    Args:
        sampler: which samples each step draws.
        encoder: how they are encoded.
        micro_batch_size: sequences of one batch.
        packing: several samples share a sequence, a batch being one row of at most micro_batch_size *
            encoder.sequence_length tokens, with the samples' borders in cu_seqlens.
        samples_per_sequence: with packing, micro_batch_size times as many samples are drawn for a portion.
        num_workers: processes; 0 works in this one.
    """

    def __init__(
        self,
        sampler: Sampler,
        encoder: Encoder,
        *,
        micro_batch_size: int,
        packing: bool = False,
        samples_per_sequence: int = 1,
        num_workers: int = 0,
    ):
        self._portions = _Portions(sampler, encoder, micro_batch_size, packing, samples_per_sequence)
        self._num_workers = num_workers

    def portions(self, start: int = 0) -> Iterator[Portion]:
        """The portions of the steps from `start` on, in order."""
        if not self._num_workers:
            yield from self._loader(start)
            return
        is_over = Event()
        # Called ahead of what ends the workers, which a traceback may keep until then.
        atexit.register(is_over.set)
        workers = {"prefetch_factor": 4, "worker_init_fn": partial(_heed_signals, is_over)}
        portions = iter(self._loader(start, **workers))  # it ends the workers when it goes, which is behind `set`
        try:
            yield from portions
        finally:
            is_over.set()
            atexit.unregister(is_over.set)

    def _loader(self, start: int, **workers: Any) -> DataLoader:
        # Its own generator: the loader draws a seed for workers, and torch's global one is not ours to advance.
        return DataLoader(
            self._portions,
            sampler=self._portions.keys(start),
            batch_size=None,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
            num_workers=self._num_workers,
            **workers,
        )


class _Portions(Dataset):
    """Portions by (step, number)."""

    def __init__(
        self, sampler: Sampler, encoder: Encoder, micro_batch_size: int, packing: bool, samples_per_sequence: int
    ):
        self.sampler, self.encoder, self.packing = sampler, encoder, packing
        self.num_samples = micro_batch_size * (samples_per_sequence if packing else 1)
        self.max_tokens = micro_batch_size * encoder.sequence_length
        self.per_step = -(-len(sampler.slots) // self.num_samples)

    def keys(self, start: int) -> Iterator[tuple[int, int]]:
        return ((step, number) for step in range(start, self.sampler.steps) for number in range(self.per_step))

    def __getitem__(self, key: tuple[int, int]) -> Portion:
        step, number = key
        portion = Portion(step, number == self.per_step - 1, self.sampler.modality(step))
        first = number * self.num_samples
        draws = self.sampler.draws(step, first, first + self.num_samples)
        samples = [self._good(draw, portion) for draw in draws]
        good = [sample for sample in samples if sample is not None]
        if portion.failure is None:
            groups = _first_fit(good, self.max_tokens) if self.packing else [good]
            portion.batches = [self._batch(group) for group in groups]
        return portion

    def _good(self, draw: Draw, portion: Portion) -> tuple[str, Encoded] | None:
        """The sample drawn, or the first good one of its replacements, with its id."""
        entry = self.sampler.mixture.entries[draw.entry]
        name = entry.source.name
        augment, bad = None, 0
        for attempt in range(MAX_OVERLONG):
            chosen = draw if attempt == 0 else self.sampler.replacement(draw, attempt)
            if entry.augment is not None:
                augment = partial(_augmented, change=entry.augment, generator=self.sampler.augmentation(draw, attempt))
            sample_id = f"{name}[{chosen.index}]"
            try:
                sample = _sample(entry.source, chosen.index)
                sample_id = sample.id
                encoded, cut = self.encoder(sample, augment)
            except BadSample as error:
                portion.rejections.append(Rejection(name, error.sample_id or sample_id, error.reason))
                is_overlong = isinstance(error, Overlong)
                portion.overlong_samples += is_overlong
                bad += not is_overlong
                if bad == MAX_ATTEMPTS:
                    break
                continue
            portion.samples[name] += 1
            portion.tokens[name] += len(encoded.input_ids)
            portion.cut_tokens += cut
            return f"{name}/{sample_id}", encoded
        last = portion.rejections[-1]
        portion.failure = (
            f"{attempt + 1} samples in a row drawn from {name!r} are {'bad' if bad else 'too long'}; of the last one, "
            f"{last.sample_id!r}: {last.reason}"
        )
        return None

    def _batch(self, group: list[tuple[str, Encoded]]) -> Batch:
        sample_ids, samples = zip(*group, strict=True)
        make, length = (pack, self.max_tokens) if self.packing else (collate, self.encoder.sequence_length)
        return make(samples, self.encoder.processor, length=length, sample_ids=sample_ids)


def _sample(source: Source, index: int) -> Sample:
    try:
        return source[index]
    except BadSample:
        raise
    except Exception as error:  # which may look like a user's error in the configuration
        raise RuntimeError(
            f"The source {source.name!r} failed at [{index}]: {type(error).__name__}: {error}"
        ) from error


def _augmented(image: Image.Image, *, change: Augment, generator: np.random.Generator) -> Image.Image:
    return change(image, generator)


def _heed_signals(is_over: Any, _: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach workers too; but they are needed until whoever reads from them is over, who
    then ends them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if is_over.is_set() else None)


def _as_it_is(portion: Any) -> Any:
    return portion


def _first_fit(samples: list[tuple[str, Encoded]], max_tokens: int) -> list[list[tuple[str, Encoded]]]:
    """Samples in groups of at most `max_tokens`, each put into the first group with room, longest first."""
    groups: list[list[tuple[str, Encoded]]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample[1].input_ids)):
        length = len(sample[1].input_ids)
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            groups.append([])
            room.append(max_tokens)
            place = len(groups) - 1
        groups[place].append(sample)
        room[place] -= length
    return groups
