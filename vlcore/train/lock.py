"""One run at a time in a folder: two would delete each other's checkpoints."""

import errno
import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import register_after_fork
from pathlib import Path

LOCK = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the folder, which is made if it is not there, for as long as the block takes.

    The lock is the system's, on a file that stays: whatever ends the process, kill -9 too, frees it.

    Raises:
        ValueError: another run holds it.
        OSError: the folder cannot be written to.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK).open("a") as file:
        # A worker that outlives a killed run for a moment must not hold its lock.
        register_after_fork(file, lambda inherited: inherited.close())
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise ValueError(
                    f"{output_dir} is in use by another run, and two in one folder would destroy each other's work; "
                    "wait for it to end, or choose another output_dir."
                ) from None
            reason = f"{output_dir} is on a filesystem without locks ({error}): start no second run in it."
            warnings.warn(reason, stacklevel=3)
        yield
