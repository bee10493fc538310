"""One run at a time in a folder, and none that a killed one or its workers keep out."""

import errno
import fcntl
import signal
import subprocess
import sys
from multiprocessing import get_context

import pytest

from vlcore.train.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from vlcore.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_folder_that_another_run_uses_is_refused_until_it_is_killed(run, stage, holder, tmp_path):
    with pytest.raises(ValueError, match="run is in use by another run, and two in one folder"):
        run(stage(steps=1), resume=False)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run(stage(steps=1)).stages[0].steps == 1
    assert run(stage(steps=1), folder="other").stages[0].steps == 1


def test_a_run_does_not_begin_another_in_its_own_folder(run, stage):
    with pytest.raises(ValueError, match="run is in use by another run"):
        run(stage(steps=1), on_stage_end=lambda *_: run(stage(steps=1), resume=False))


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    context = get_context("fork")
    begun, end = context.Event(), context.Event()
    worker = context.Process(target=lambda: (begun.set(), end.wait()), daemon=True)
    with locked(tmp_path):
        worker.start()
        begun.wait()
    with locked(tmp_path):
        end.set()
    worker.join()


def test_a_filesystem_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="on a filesystem without locks .*No locks available"), locked(tmp_path):
        pass
