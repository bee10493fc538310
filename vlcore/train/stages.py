"""The paper's three stages as data (arXiv 2403.05525, tables 1, 2 and 4): pass the mixtures, get the stages.

Any field may be changed with `dataclasses.replace(stage, ...)` or from the command line.
"""

from collections.abc import Mapping
from typing import Any, Literal

from vlcore.config import VLConfig
from vlcore.data import Entry, Mixture, Source
from vlcore.train.config import Stage

Size = Literal["1.3B", "7B"]

# Percent of the training data by category (table 1, and table 2 for the fine-tuning).
PRETRAINING_PERCENT = {
    "interleaved": 13.1,
    "caption": 11.1,
    "table_chart": 2.1,
    "web_code": 0.4,
    "scene_text_ocr": 1.2,
    "document_ocr": 2.1,
    "text": 70.0,
}
FINETUNING_PERCENT = {
    "in_house": 10.5,
    "general_multimodal": 35.5,
    "table_chart": 4.1,
    "web_code": 2.0,
    "text": 47.9,
}
# Samples of the adaptor's warm-up: image-text captions, and rendered pages of documents.
WARMUP_SAMPLES = {"caption": 1_250_000, "document_ocr": 2_500_000}

# Table 4, where the sizes differ.
_STEPS = {"1.3B": (15_000, 96_000, 10_000), "7B": (15_000, 42_000, 10_000)}
_LEARNING_RATES = {"1.3B": (1e-3, 3e-5, 2e-5), "7B": (1e-3, 4.2e-5, 2e-5)}
_BATCH_SIZES = {"1.3B": (256, 1024, 256), "7B": (256, 2304, 256)}

# What an image takes of a sequence, in both sizes.
NUM_IMAGE_TOKENS = VLConfig().num_image_tokens


def adaptor_warmup(mixture: Mixture, size: Size = "1.3B") -> Stage:
    """Stage 1: the adaptor learns to speak to a frozen language model, from captions and rendered documents.

    The paper's sequence length is 512, which no image of 576 tokens fits: we read it as the text's, beside one image
    (ours).

    Raises:
        ValueError: `size` is neither "1.3B" nor "7B".
    """
    return Stage(
        name="stage1",
        trains=("adaptor",),
        mixture=mixture,
        schedule="cosine",
        warmup_steps=128,
        sequence_length=512 + NUM_IMAGE_TOKENS,
        supervise="text",
        **_by_size(size, 0),
    )


def joint_pretraining(mixture: Mixture, size: Size = "1.3B", *, finetuning_share: float = 0.0) -> Stage:
    """Stage 2: adaptor and language model learn from 70 % text and 30 % images.

    Args:
        mixture: weights decide the ratio within each modality; between them it is 70 : 30.
        size: "1.3B" or "7B".
        finetuning_share: the paper mixes in a small share of fine-tuning data and does not say how much (ours: none by
            default). It is taken from text; give the multimodal fine-tuning entries their weights in `mixture`.

    Raises:
        ValueError: a size that the paper does not have, or a share outside 0..0.7.
    """
    if not 0 <= finetuning_share <= 0.7:
        raise ValueError(f"finetuning_share {finetuning_share} must be in 0..0.7: it is taken from the 0.7 of text.")
    return Stage(
        name="stage2",
        trains=("adaptor", "language"),
        mixture=mixture,
        schedule="step",
        warmup_steps=2000,
        sequence_length=4096,
        packing=True,
        overlong="truncate",
        supervise="text",
        text_ratio=0.7 - finetuning_share,
        modality_warmup=0.1,
        **_by_size(size, 1),
    )


def supervised_finetuning(mixture: Mixture, size: Size = "1.3B", *, train_sam: bool = False) -> Stage:
    """Stage 3: language model, adaptor and SigLIP learn the answers of conversations.

    Args:
        mixture: instructions, multimodal and text; the weights decide the ratio.
        size: "1.3B" or "7B".
        train_sam: train SAM too. The paper froze it for want of memory; its summary says that everything trains.

    Raises:
        ValueError: `size` is neither "1.3B" nor "7B".
    """
    return Stage(
        name="stage3",
        trains=("language", "adaptor", "siglip", "sam") if train_sam else ("language", "adaptor", "siglip"),
        mixture=mixture,
        schedule="cosine",
        warmup_steps=256,
        sequence_length=4096,
        supervise="answers",
        **_by_size(size, 2),
    )


def weighted(percent: Mapping[str, float], sources: Mapping[str, Source]) -> Mixture:
    """A mixture by the percentages of a table, for a source a category.

    Args:
        percent: PRETRAINING_PERCENT, FINETUNING_PERCENT, or a table of one's own.
        sources: a source for each category wanted; the others are left out and the rest keep their proportions.

    Raises:
        ValueError: a source for a category that the table does not have.
    """
    unknown = sorted(set(sources) - set(percent))
    if unknown:
        raise ValueError(f"There is no category {unknown} in the table of {list(percent)}.")
    return Mixture(entries=tuple(Entry(source=source, weight=percent[name]) for name, source in sources.items()))


def _by_size(size: str, stage: int) -> dict[str, Any]:
    if size not in _STEPS:
        raise ValueError(f"The paper trains {' and '.join(_STEPS)}, not {size!r}.")
    return {
        "steps": _STEPS[size][stage],
        "learning_rate": _LEARNING_RATES[size][stage],
        "batch_size": _BATCH_SIZES[size][stage],
    }
