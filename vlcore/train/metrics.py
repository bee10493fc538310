"""What a step measured, and metrics.jsonl, where it is written down."""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlcore.processing.writing import naming, replacing_file
from vlcore.train.result import StageResult


@dataclass(kw_only=True)
class StepRecord:
    """One global step.

    Attributes:
        step: of the stage; global_step: of the run.
        modality: "text", "multimodal" or "mixed".
        loss: summed over the supervised tokens, in nats.
        grad_norm: before clipping, of the mean loss.
        seconds: wall time; data_seconds: the part of it spent waiting for data.
        skipped: it was not finite, and no weight changed.
        suspects: with `skipped`, the samples of the micro-batches whose loss was not finite, or of all of them.
    """

    step: int
    global_step: int
    learning_rate: float
    modality: str = ""
    loss: float = 0.0
    grad_norm: float = 0.0
    supervised_tokens: int = 0
    images: int = 0
    bad_samples: int = 0
    overlong_samples: int = 0
    cut_tokens: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    data_seconds: float = 0.0
    skipped: bool = False
    suspects: tuple[str, ...] = ()


def count(total: StageResult, record: StepRecord, *, in_tail: bool) -> None:
    """Add a step to its stage's totals."""
    total.steps += 1
    total.seconds += record.seconds
    total.supervised_tokens += record.supervised_tokens
    total.images += record.images
    total.skipped_steps += record.skipped
    total.bad_samples += record.bad_samples
    total.overlong_samples += record.overlong_samples
    total.cut_tokens += record.cut_tokens
    total.samples_by_source += record.samples
    total.tokens_by_source += record.tokens
    if in_tail and not record.skipped:
        total.tail_loss += record.loss
        total.tail_tokens += record.supervised_tokens


def summary(records: list[StepRecord], total: StageResult) -> dict[str, Any]:
    """A line of metrics.jsonl: steps in a row summed up, and the shares of each source in the stage so far.

    `loss` (nats a supervised token) and `grad_norm` are over the steps that were not skipped, null where none is left;
    `suspects` names the samples of those that were.
    """
    last, seconds = records[-1], sum(record.seconds for record in records)
    good = [record for record in records if not record.skipped]
    supervised = sum(record.supervised_tokens for record in good)
    modalities = {record.modality for record in records}
    return {
        "stage": total.name,
        "step": last.step,
        "global_step": last.global_step,
        "modality": modalities.pop() if len(modalities) == 1 else "mixed",
        "loss": sum(record.loss for record in good) / supervised if supervised else None,
        "learning_rate": last.learning_rate,
        "grad_norm": sum(record.grad_norm for record in good) / len(good) if good else None,
        "seconds": seconds,
        "data_wait": sum(record.data_seconds for record in records) / seconds,
        "samples_per_second": sum(record.samples.total() for record in records) / seconds,
        "tokens_per_second": sum(record.tokens.total() for record in records) / seconds,
        "images_per_second": sum(record.images for record in records) / seconds,
        "supervised_tokens": supervised,
        "sample_share": _shares(total.samples_by_source),
        "token_share": _shares(total.tokens_by_source),
        "skipped_steps": total.skipped_steps,
        "suspects": list(dict.fromkeys(name for record in records for name in record.suspects)),
        "bad_samples": total.bad_samples,
        "overlong_samples": total.overlong_samples,
        "cut_tokens": total.cut_tokens,
    }


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: round(number / counts.total(), 4) for name, number in sorted(counts.items())}


def read_json_lines(path: Path, keys: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a file that this run or an earlier one appended to; a last line cut off by a crash is left out.

    Raises:
        ValueError: a line is not a JSON object with the keys; the file and the line are named.
    """
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    return [_row(line, keys, f"{path}, line {number}") for number, line in enumerate(complete.split(b"\n"), 1) if line]


def _row(line: bytes, keys: Collection[str], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}.") from None
    if not isinstance(row, dict) or not row.keys() >= set(keys):
        raise ValueError(f"{where} is damaged: it is no object with {', '.join(keys)}.")
    return row


class MetricsLog:
    """Writes a line of metrics.jsonl for every `every` steps.

    Args:
        path: the file; lines of steps from `global_step` on, which a stopped run left there, are removed.
        every: steps that a line sums up.
        global_step: the step that the run begins with.

    Raises:
        ValueError: what the file holds is damaged.
        OSError: it cannot be written, here or later.
    """

    def __init__(self, path: Path, every: int, global_step: int):
        self.path, self.every = path, every
        self._records: list[StepRecord] = []
        kept = [row for row in read_json_lines(path, ["global_step"]) if row["global_step"] < global_step]
        write_json_lines(path, kept)

    def add(self, record: StepRecord, total: StageResult) -> None:
        """Count a step of the stage that `total` is of in, and write when `every` are together."""
        self._records.append(record)
        if len(self._records) == self.every:
            self.flush(total)

    def flush(self, total: StageResult) -> None:
        """Write what there is, as at a checkpoint, so that a resumed run goes on with a new line."""
        records, self._records = self._records, []
        if records:
            append_json_lines(self.path, [summary(records, total)])


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows at the file's end."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file's rows, all at once."""
    with replacing_file(path) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
