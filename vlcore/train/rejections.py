"""The list of samples that were not used, and the limit on how many may be bad."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from vlcore.data import Rejection
from vlcore.train.metrics import append_json_lines, read_json_lines, write_json_lines
from vlcore.train.result import TrainingStopped

# So many bad samples say nothing about the data yet, however few were drawn.
FORGIVEN = 8


class RejectionLog:
    """Lists each bad sample in a file, once a reason, a JSON object a line: `source`, `sample_id`, `reason`.

    Args:
        path: the file; what an earlier part of the run listed there is not listed again.
        limit: the part of the samples drawn that may be bad.

    Raises:
        ValueError: what the file holds is damaged.
        OSError: it cannot be written, here or later.
    """

    def __init__(self, path: Path, limit: float):
        self.path, self.limit = path, limit
        keys = [field.name for field in fields(Rejection)]
        rows = read_json_lines(path, keys)
        self._listed = {Rejection(*(str(row[key]) for key in keys)) for row in rows}
        if path.exists():  # its last line may be cut off, and the next one would be written behind it
            write_json_lines(path, rows)

    def add(self, rejections: Iterable[Rejection]) -> None:
        """List those that are not listed yet."""
        unlisted = [rejection for rejection in dict.fromkeys(rejections) if rejection not in self._listed]
        if unlisted:
            self._listed.update(unlisted)
            append_json_lines(self.path, map(asdict, unlisted))

    def check(self, bad: int, drawn: int) -> None:
        """Stop the run where more than `limit` of the samples drawn are bad.

        Raises:
            TrainingStopped: naming the file that lists them.
        """
        if bad > max(FORGIVEN, self.limit * drawn):
            raise TrainingStopped(
                f"{bad} of {drawn} samples drawn are bad, more than the allowed {self.limit:.1%} (max_bad_samples); "
                f"{self.path} lists them."
            )
