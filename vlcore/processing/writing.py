"""Files that are written whole or not at all, and errors that name the file that could not be."""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(*paths: Path) -> Iterator[None]:
    """Whatever the system refuses inside of the block is said of these files: of a full disk it names none itself.

    Raises:
        OSError: the system's, with the paths before it.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{', '.join(map(str, paths))} could not be written: {error}") from error


@contextmanager
def replacing_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """A path beside each file to write to; they take the files' places when the block ends without an error.

    None is moved before all of them are on disk. After an error nothing is left beside the files, and they are as they
    were unless it was a renaming that failed.

    Raises:
        OSError: a file cannot be written; all of them are named.
    """
    beside = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial") for path in paths]
    try:
        with naming(*paths):
            yield beside
            for fresh in beside:
                _sync(fresh)
            for fresh, path in zip(beside, paths, strict=True):
                fresh.replace(path)
    finally:
        for fresh in beside:
            fresh.unlink(missing_ok=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """`replacing_files` for one."""
    with replacing_files([path]) as (beside,):
        yield beside


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
