"""A directory that appears whole or not at all: written beside its place, then moved into it."""

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def replacing_directory(directory: str | Path, replaced: tuple[str, ...] = ()) -> Iterator[Path]:
    """A fresh directory to write into, which takes the place of `directory` when the block ends without an error.

    What `directory` already holds is kept, except for the names that the block wrote and the patterns in `replaced`.
    Every file written may be read by whom the umask allows: safetensors would allow its owner alone. After an error in
    the block `directory` is as it was. Interrupted later, by Ctrl-C or an error, it has the old content or the new one,
    whole. Nothing is left beside it.

    Linux exchanges the two in one step, on the filesystems that can. Elsewhere they are renamed one after the other:
    for that moment there is no `directory`, and a process that is killed in it leaves the old content beside its
    place, under a name that ends in ".replaced".

    Raises:
        NotADirectoryError: `directory` is a file.
        OSError: it cannot be written.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a directory to write into.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(target, "incomplete")
    try:
        fresh.mkdir()
        allowed = stat.S_IMODE(fresh.stat().st_mode) & 0o666  # what the umask leaves of a file's mode
        yield fresh
        for written in fresh.rglob("*"):
            if written.is_file() and not written.is_symlink():
                written.chmod(stat.S_IMODE(written.stat().st_mode) | allowed)
        if target.exists():
            _keep_the_rest(target, fresh, replaced)
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        _put_in_place(fresh, target)
        _sync(target.parent)
    finally:
        # What is under this name now: an unfinished directory, or the old one after an exchange.
        shutil.rmtree(fresh, ignore_errors=True)


def _keep_the_rest(target: Path, fresh: Path, replaced: tuple[str, ...]) -> None:
    """Bring into `fresh` what `target` holds and the block did not write; files are linked where they can be."""
    fresh.chmod(stat.S_IMODE(target.stat().st_mode))
    for kept in target.iterdir():
        if (fresh / kept.name).exists() or any(kept.match(pattern) for pattern in replaced):
            continue
        if kept.is_symlink() or kept.is_file():
            _link_or_copy(kept, fresh / kept.name)
        elif kept.is_dir():
            shutil.copytree(kept, fresh / kept.name, symlinks=True, copy_function=_link_or_copy)


def _link_or_copy(source: str | Path, copy: str | Path) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)


def _put_in_place(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        _rename_both(fresh, target)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where the system or the filesystem cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library of before 2018
        return False
    if not renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE):
        return True
    if (code := ctypes.get_errno()) in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _rename_both(fresh: Path, target: Path) -> None:
    old = _beside(target, "replaced")
    try:
        target.rename(old)
        fresh.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, state: str) -> Path:
    """A free name beside `target`, and so on the same filesystem."""
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.{state}"


def _sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
