"""A progress bar for whoever watches a run."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vlcore.train.config import Stage
from vlcore.train.metrics import StepRecord


class Bar:
    """A progress bar on standard error, a line a stage; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, stage: Stage, step: int) -> None:
        self._task = self._progress.add_task(stage.name, total=stage.steps, completed=step, state="")

    def update(self, record: StepRecord) -> None:
        """Show a step."""
        assert self._task is not None
        loss = record.loss / max(1, record.supervised_tokens)
        state = (
            f"{record.modality} loss {loss:.3f} · {record.tokens.total() / record.seconds:,.0f} tokens/s · "
            f"{record.images / record.seconds:,.1f} images/s · data wait {record.data_seconds / record.seconds:.0%}"
        )
        self._progress.update(self._task, advance=1, state=state)
