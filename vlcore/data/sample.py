"""What a source of training data yields, and what any source must offer."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

Modality = Literal["text", "multimodal"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


class BadSample(ValueError):
    """A sample that cannot be trained on. The trainer skips, counts and lists it.

    Args:
        reason: what was found and why it can't be used.
        sample_id: the sample's own id, where it could still be read.
    """

    def __init__(self, reason: str, sample_id: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.sample_id = sample_id


class Overlong(BadSample):
    """A sample with more tokens than a sequence has. Nothing is wrong with it: it is skipped and counted apart."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document or one conversation.

    Attributes:
        id: names the sample in messages and in bad_samples.jsonl.
        modality: "text" or "multimodal".
        document: parts in reading order, text as str, an image as Path, bytes, Pillow image or array.
        conversation: messages `{"role": ..., "content": str | [{"type": "text" | "image", ...}]}`, the last an answer.
    """

    id: str
    modality: Modality
    document: list[Any] | None = None
    conversation: list[dict[str, Any]] | None = None

    def __post_init__(self):
        if (self.document is None) == (self.conversation is None):
            raise ValueError(f"Sample {self.id!r} must be either a document or a conversation.")


@runtime_checkable
class Source(Protocol):
    """A map-style collection of samples; `source[i]` raises BadSample where the i-th cannot be used.

    With worker processes a source travels to them by pickling or forking, so it should hold paths and not open files.
    It may also have `fingerprint() -> str`, which tells its rows from others: with it, a run that is resumed notices
    where they were changed.
    """

    name: str
    modality: Modality

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...
