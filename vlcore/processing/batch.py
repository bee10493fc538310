"""Encoded samples -> the tensors of one step: padded into a rectangle, or packed into one row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlcore.processing.images import batch_pixels
from vlcore.processing.processor import Processor
from vlcore.processing.segments import IGNORE_INDEX, Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one forward.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, aligned with `input_ids`; -100 where nothing is to be learned.
        pixels: (I, 3, S, S) float32 in [0, 1] in reading order of the placeholders, or None without images.
        attention_mask: (B, T) bool, true at real tokens; None where causal attention needs none: on right-padded and
            on packed batches.
        positions: (B, T) int64, the place of each token in its own sequence; None where it is the column.
        cu_seqlens: (num_sequences + 1,) int32 where several sequences share one row, else None.
        lengths: tokens of each sequence, padding not counted.
        sample_ids: what each sequence is called, or empty.
    """

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor | None = None
    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    lengths: tuple[int, ...] = ()
    sample_ids: tuple[str, ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory, which a GPU reads from while the host goes on."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned)

    @property
    def num_tokens(self) -> int:
        """Real tokens, image placeholders included and padding not."""
        return sum(self.lengths)

    @property
    def num_images(self) -> int:
        return 0 if self.pixels is None else len(self.pixels)

    @property
    def num_supervised(self) -> int:
        """Labels that some position predicts: the first token of a sequence has none before it.

        It waits for the device where the labels are on one; count before `to`.
        """
        counted = self.labels != IGNORE_INDEX
        counted[:, 0] = False
        if self.cu_seqlens is not None:
            counted[0, self.cu_seqlens[:-1].long()] = False
        return int(counted.sum())


def collate(
    samples: Sequence[Encoded],
    processor: Processor,
    *,
    side: str = "right",
    pad_id: int | None = None,
    length: int | None = None,
    sample_ids: Sequence[str] = (),
) -> Batch:
    """Pad samples to the longest of them.

    Args:
        samples: one or more.
        processor: gives the image settings and the padding id (EOS in DeepSeek-VL).
        side: "right" for training, without a mask: what stands before padding never sees it. "left" for generation,
            with `attention_mask` and positions that begin at the first real token.
        pad_id: instead of the processor's.
        length: the most tokens a sample may have.
        sample_ids: names for errors and for the batch, one a sample or none.

    Raises:
        ValueError: no samples, a sample over `length`, one whose placeholders do not match its images, a `side` that is
            neither, or as many names as there are not samples.
    """
    if side not in ("left", "right"):
        raise ValueError(f"collate: side is {side!r}; it must be 'left' or 'right'.")
    _check("collate", samples, processor, length, sample_ids)
    lengths = tuple(map(len, samples))
    shape = (len(samples), max(lengths))
    input_ids = torch.full(shape, processor.pad_token_id if pad_id is None else pad_id)
    labels = torch.full(shape, IGNORE_INDEX)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        real = slice(0, len(sample)) if side == "right" else slice(shape[1] - len(sample), None)
        input_ids[row, real] = sample.input_ids
        labels[row, real] = sample.labels
        mask[row, real] = True
    left = side == "left"
    return Batch(
        input_ids,
        labels,
        _pixels(samples, processor),
        attention_mask=mask if left else None,
        positions=(mask.cumsum(1) - 1).clamp_min(0) if left else None,
        lengths=lengths,
        sample_ids=tuple(sample_ids),
    )


def pack(
    samples: Sequence[Encoded],
    processor: Processor,
    *,
    length: int | None = None,
    fill: bool = False,
    sample_ids: Sequence[str] = (),
) -> Batch:
    """Put samples behind each other into one row; `cu_seqlens` parts them and positions restart with each.

    Args:
        samples: one or more.
        processor: gives the image settings and the padding id.
        length: the most tokens the row may have.
        fill: pad the row to `length`, so that its shape is always the same; the padding is a sequence of its own, the
            last of `cu_seqlens`, without labels.
        sample_ids: names for errors and for the batch, one a sample or none.

    Raises:
        ValueError: no samples, more than `length` tokens, a sample whose placeholders do not match its images, `fill`
            without `length`, or as many names as there are not samples.
    """
    if fill and length is None:
        raise ValueError("pack: fill=True needs a length to fill to.")
    _check("pack", samples, processor, length, sample_ids)
    lengths = tuple(map(len, samples))
    if length is not None and sum(lengths) > length:
        raise ValueError(f"pack: {len(samples)} samples have {sum(lengths)} tokens; the row's length is {length}.")
    padding = length - sum(lengths) if fill and length is not None else 0
    pieces = lengths + ((padding,) if padding else ())
    input_ids = torch.cat([*(sample.input_ids for sample in samples), torch.full((padding,), processor.pad_token_id)])
    labels = torch.cat([*(sample.labels for sample in samples), torch.full((padding,), IGNORE_INDEX)])
    return Batch(
        input_ids[None],
        labels[None],
        _pixels(samples, processor),
        positions=torch.cat([torch.arange(piece) for piece in pieces])[None],
        cu_seqlens=torch.tensor([0, *pieces]).cumsum(0).int(),
        lengths=lengths,
        sample_ids=tuple(sample_ids),
    )


def _check(
    where: str, samples: Sequence[Encoded], processor: Processor, length: int | None, sample_ids: Sequence[str]
) -> None:
    if not samples:
        raise ValueError(f"{where}: there are no samples.")
    if sample_ids and len(sample_ids) != len(samples):
        raise ValueError(f"{where}: {len(sample_ids)} sample_ids do not name {len(samples)} samples.")
    for index, sample in enumerate(samples):
        name = f"sample {sample_ids[index]!r}" if sample_ids else f"sample {index}"
        if length is not None and len(sample) > length:
            raise ValueError(f"{where}: {name} has {len(sample)} tokens; the length is {length}.")
        try:
            sample.check_images(processor.control)
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from None


def _pixels(samples: Sequence[Encoded], processor: Processor) -> Tensor | None:
    return batch_pixels([image for sample in samples for image in sample.images], processor.settings)
