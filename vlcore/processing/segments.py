"""A prompt as text, pictures and control tokens -> token ids and labels."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Text:
    """Ordinary text: whatever it spells, it never becomes a control token."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Picture:
    """An image, as given by the user, and what an error calls it where the source itself has no name."""

    source: Any
    where: str


@dataclass(frozen=True)
class Bos:
    """The token that begins every prompt."""


@dataclass(frozen=True)
class Eos:
    """The token that ends an answer or a document."""

    supervised: bool = False


Segment = Text | Picture | Bos | Eos


class ControlTokens(NamedTuple):
    """The ids that only a template makes, and how many of the last one an image takes."""

    bos: int
    eos: int
    image: int
    num_image_tokens: int


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenised sample.

    Attributes:
        input_ids: (T,) int64, with `num_image_tokens` placeholders for each image.
        labels: (T,) int64, aligned with `input_ids` (not shifted); -100 where nothing is to be learned.
        images: the images in the order of their placeholders, mode "RGB".
    """

    input_ids: Tensor
    labels: Tensor
    images: list[Image.Image]

    def __post_init__(self):
        ids, labels = self.input_ids, self.labels
        if ids.ndim != 1 or ids.shape != labels.shape or {ids.dtype, labels.dtype} != {torch.int64}:
            raise ValueError(
                f"Encoded: input_ids {tuple(ids.shape)} {ids.dtype} and labels {tuple(labels.shape)} {labels.dtype} "
                "must both be (T,) torch.int64."
            )
        if not len(ids):
            raise ValueError("Encoded: it has no tokens.")

    def __len__(self) -> int:
        return len(self.input_ids)

    def check_images(self, control: ControlTokens) -> None:
        """Raises ValueError unless there are as many placeholders as the images need."""
        placeholders = self.input_ids == control.image
        num_placeholders, expected = int(placeholders.sum()), len(self.images) * control.num_image_tokens
        if num_placeholders != expected:
            raise ValueError(
                f"Encoded: {num_placeholders} image placeholders (id {control.image}) do not match {len(self.images)} "
                f"images of {control.num_image_tokens} each."
            )


def encode_segments(
    segments: Iterable[Segment], encode: Callable[[str], Any], control: ControlTokens
) -> tuple[list[int], list[int]]:
    """Tokenise a prompt.

    Adjacent texts are tokenised as one string, so that the ids are those of the whole prompt written out, which is
    what the public code tokenises; there, too, control tokens part the text before anything else. A token belongs to
    the text that its last character stands in.

    Args:
        encode: text -> an object with `ids` and `offsets`, such as `tokenizers.Encoding`.

    Returns:
        ids and labels of equal length; labels repeat the ids of supervised texts and are -100 elsewhere.
    """
    ids: list[int] = []
    labels: list[int] = []
    for is_text, group in groupby(segments, key=lambda segment: isinstance(segment, Text)):
        run = list(group)
        if is_text:
            _append_text(run, encode, ids, labels)
            continue
        for segment in run:
            token, count = _control_token(segment, control)
            supervised = isinstance(segment, Eos) and segment.supervised
            ids += [token] * count
            labels += [token if supervised else IGNORE_INDEX] * count
    return ids, labels


def _append_text(run: Sequence[Any], encode: Callable[[str], Any], ids: list[int], labels: list[int]) -> None:
    starts = [0, *accumulate(len(text.text) for text in run)][:-1]
    encoding = encode("".join(text.text for text in run))
    for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
        text = run[bisect_right(starts, max(end - 1, 0)) - 1]
        ids.append(token)
        labels.append(token if text.supervised else IGNORE_INDEX)


def _control_token(segment: Segment, control: ControlTokens) -> tuple[int, int]:
    if isinstance(segment, Picture):
        return control.image, control.num_image_tokens
    return (control.bos if isinstance(segment, Bos) else control.eos), 1
