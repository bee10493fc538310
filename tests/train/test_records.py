"""metrics.jsonl and bad_samples.jsonl: what a crash, damage or a full disk does to them."""

import json
from pathlib import Path

import pytest

from vlcore.data import Rejection
from vlcore.train.metrics import MetricsLog, StepRecord
from vlcore.train.rejections import RejectionLog
from vlcore.train.result import StageResult

TOTAL = StageResult("only")


def record(step):
    return StepRecord(step=step, global_step=step, learning_rate=1.0, seconds=1.0)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def full_disk(monkeypatch):
    """From its call on, no file grows and no new one reaches the disk."""
    open_path = Path.open

    def full(*_):
        raise OSError(28, "No space left on device")

    def full_disk():
        monkeypatch.setattr("os.fsync", full)
        monkeypatch.setattr(
            Path, "open", lambda path, mode="r", **k: full() if mode == "a" else open_path(path, mode, **k)
        )

    return full_disk


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    for text, kept in (('{"source": "a", "sam', []), ('{"source": "a", "sample_id": "1", "reason": "r"}\n{"so', ["a"])):
        path.write_text(text)
        log = RejectionLog(path, 0.1)
        log.add([Rejection("b", "1", "r")])
        assert [row["source"] for row in rows(path)] == [*kept, "b"]
        RejectionLog(path, 0.1)


def test_a_bad_sample_is_listed_once_for_each_reason(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    first, second = Rejection("a", "1", "too long"), Rejection("a", "1", "its image \ud800 is gone")
    RejectionLog(path, 0.1).add([first, second, first])
    RejectionLog(path, 0.1).add([second, first])
    assert [Rejection(**row) for row in rows(path)] == [first, second]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{broken", "Expecting property name"),
        (b'{"step": 3}', "it is no object with global_step"),
        (b"[1]", "it is no object with global_step"),
        (b'{"global_step": "\xff"}', "can't decode byte 0xff"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"global_step": 0}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2 is damaged: .*{reason}"):
        MetricsLog(path, 1, 5)
    assert path.read_bytes().endswith(line + b"\n")


def test_a_damaged_list_of_bad_samples_is_named(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"source": "a"}\n')
    with pytest.raises(ValueError, match=r"bad_samples\.jsonl, line 1 is damaged: .*source, sample_id, reason"):
        RejectionLog(path, 0.1)


def test_a_full_disk_is_said_of_the_metrics(tmp_path, full_disk):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 1, 0)
    log.add(record(0), TOTAL)
    before = path.read_bytes()
    full_disk()
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: .*No space left"):
        log.add(record(1), TOTAL)
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: .*No space left"):
        MetricsLog(path, 1, 5)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_of_the_list_of_bad_samples(tmp_path, full_disk):
    path = tmp_path / "bad_samples.jsonl"
    log = RejectionLog(path, 0.1)
    log.add([Rejection("a", "1", "r")])
    before = path.read_bytes()
    full_disk()
    with pytest.raises(OSError, match=r"bad_samples\.jsonl could not be written: .*No space left"):
        log.add([Rejection("a", "2", "r")])
    with pytest.raises(OSError, match=r"bad_samples\.jsonl could not be written: .*No space left"):
        RejectionLog(path, 0.1)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
