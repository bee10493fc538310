"""The demo's training run: the paper's three stages, made small."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlcore.config import VLConfig
from vlcore.data import Entry, JsonlConversations, JsonlDocuments, JsonlText, Mixture
from vlcore.demo.augment import redraw_flag, reprint_page
from vlcore.demo.build import DataSet
from vlcore.train import Stage, TrainConfig, adaptor_warmup, joint_pretraining, supervised_finetuning


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Steps of the three stages."""

    stage1: int = 60
    stage2: int = 150
    stage3: int = 900


QUICK = Lengths(stage1=2, stage2=4, stage3=4)


def make_config(
    data: DataSet,
    model: VLConfig,
    lengths: Lengths,
    output_dir: Path,
    *,
    seed: int,
    precision: Literal["fp32", "bf16"],
    on_stage_end: Callable[..., Any] | None = None,
) -> TrainConfig:
    """The three stages over the built data.

    What they train and supervise, their schedules, the ratio of stage 2, its grouping and its warm-up of the text
    share are the paper's; steps, batches, lengths and learning rates are ours, for a model of a few million parameters
    that starts from nothing. Stage 3 trains SAM too, which nothing has pretrained.
    """
    return TrainConfig(
        model=model,
        stages=_stages(data, lengths),
        output_dir=output_dir,
        seed=seed,
        precision=precision,
        # Decoding and redrawing pictures takes half as long as a step: it goes on beside it.
        num_workers=1,
        resume=False,
        keep=1,
        on_stage_end=on_stage_end,
    )


def _stages(data: DataSet, lengths: Lengths) -> tuple[Stage, Stage, Stage]:
    texts = Entry(source=JsonlText(data.rows("articles")), weight=0.7)
    stage1 = replace(
        adaptor_warmup(Mixture(entries=_documents(data, captions=1.0, pages=1.0))),
        steps=lengths.stage1,
        warmup_steps=lengths.stage1 // 10,
        learning_rate=2e-3,
        batch_size=32,
        micro_batch_size=32,
        sequence_length=512,
    )
    stage2 = replace(
        joint_pretraining(Mixture(entries=(texts, *_documents(data, captions=0.15, pages=0.15)))),
        steps=lengths.stage2,
        warmup_steps=lengths.stage2 // 10,
        learning_rate=2e-3,
        batch_size=4,
        micro_batch_size=4,
        sequence_length=512,
        samples_per_sequence=4,
    )
    stage3 = replace(
        supervised_finetuning(Mixture(entries=_conversations(data)), train_sam=True),
        steps=lengths.stage3,
        warmup_steps=lengths.stage3 // 20,
        learning_rate=1e-3,
        batch_size=32,
        micro_batch_size=32,
        sequence_length=256,
    )
    return stage1, stage2, stage3


def _conversations(data: DataSet) -> tuple[Entry, ...]:
    about_flags = JsonlConversations(data.rows("flag_questions"), data.root)
    about_pages = JsonlConversations(data.rows("page_questions"), data.root)
    about_articles = JsonlConversations(data.rows("article_questions"))
    return (
        Entry(source=about_flags, weight=0.65, augment=redraw_flag),
        Entry(source=about_pages, weight=0.15, augment=reprint_page),
        Entry(source=about_articles, weight=0.2),
    )


def _documents(data: DataSet, captions: float, pages: float) -> tuple[Entry, ...]:
    return (
        Entry(source=JsonlDocuments(data.rows("captions"), data.root), weight=captions, augment=redraw_flag),
        Entry(source=JsonlDocuments(data.rows("pages"), data.root), weight=pages, augment=reprint_page),
    )
