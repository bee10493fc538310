"""Writing a checkpoint whole or not at all."""

import errno
import os
import re
import resource
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import assert_same, siglip_only, telling_model
from public_models import make_telling

from vlcore import checkpoint
from vlcore.checkpoint import from_pretrained, replacing, replacing_directory, save_pretrained
from vlcore.config import preset


@pytest.fixture
def model():
    return telling_model(preset("tiny"))


@pytest.fixture
def saved(model, tmp_path):
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def snapshot(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def full_disk(*arguments, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("writer", ["save_file", "write_text", "third_shard"])
def test_a_full_disk_leaves_everything_as_it_was(model, tmp_path, monkeypatch, writer, existing):
    target = tmp_path / "model"
    if existing:
        save_pretrained(model, target)
        (target / "tokenizer.json").write_text("{}")
    before = snapshot(tmp_path)
    if writer == "write_text":
        monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    else:
        calls, original = [], safetensors.torch.save_file

        def save(*arguments, **settings):
            calls.append(1)
            if writer == "save_file" or len(calls) == 3:
                full_disk()
            original(*arguments, **settings)

        monkeypatch.setattr(checkpoint.writing, "save_file", save)
    make_telling(model, seed=1)
    with pytest.raises(OSError, match=r"could not be written to .*model, which is as it was: .*No space left"):
        save_pretrained(model, target, max_shard_size=200_000)
    assert snapshot(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([target] if existing else [])


def test_a_limit_on_the_size_of_files_is_an_error_too(model, tmp_path):
    """A real failure in the middle of a write, as safetensors reports it."""
    save_pretrained(model, tmp_path / "model")
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="which is as it was"):
            save_pretrained(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_new_checkpoint_replaces_all_of_the_old_one_and_nothing_else(model, tmp_path, monkeypatch, exchanging):
    if not exchanging:
        cannot_exchange(monkeypatch)
    target = tmp_path / "deep" / "model"
    save_pretrained(model, target, max_shard_size=300_000)
    (target / "tokenizer.json").write_text("{}")
    (target / "link").symlink_to("tokenizer.json")
    (target / "logs").mkdir()
    (target / "logs" / "a.txt").write_text("kept")
    other = telling_model(siglip_only(preset("tiny")))
    save_pretrained(other, target)
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "link", "logs"}
    assert (target / "logs" / "a.txt").read_text() == "kept" and (target / "link").read_text() == "{}"
    assert_same(from_pretrained(target), other)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_nothing_half_written_is_ever_visible(model, tmp_path, monkeypatch):
    target, seen = tmp_path / "model", []
    original = safetensors.torch.save_file

    def save(*arguments, **settings):
        seen.append(target.exists())
        original(*arguments, **settings)

    monkeypatch.setattr(checkpoint.writing, "save_file", save)
    save_pretrained(model, target, max_shard_size=300_000)
    assert len(seen) > 3 and not any(seen)


def cannot_exchange(monkeypatch):
    monkeypatch.setattr(replacing, "_exchange", lambda first, second: False)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", [".replaced", "model"])
def test_an_interrupted_swap_leaves_one_whole_checkpoint(saved, model, monkeypatch, step, done, error):
    """Where two renames replace the exchange, at each moment of them."""
    (saved / "tokenizer.json").write_text("{}")
    other, original = telling_model(siglip_only(preset("tiny"))), Path.rename
    raised = []

    def rename(path, target):
        if target.name.endswith(step) and not raised:
            raised.append(path)
            if done:
                original(path, target)
            raise error("the swap failed")
        return original(path, target)

    cannot_exchange(monkeypatch)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(error, match="the swap failed"):
        save_pretrained(other, saved)
    monkeypatch.undo()
    is_new = step == "model" and done
    assert raised
    assert_same(from_pretrained(saved), other if is_new else model)
    assert (saved / "tokenizer.json").exists() and list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_an_interrupted_exchange_leaves_one_whole_checkpoint(saved, model, monkeypatch, done):
    (saved / "logs").mkdir()
    (saved / "logs" / "a.txt").write_text("kept")
    other, original = telling_model(siglip_only(preset("tiny"))), replacing._exchange

    def exchange(first, second):
        if done and not original(first, second):
            pytest.skip("this filesystem cannot exchange two directories")
        raise KeyboardInterrupt

    monkeypatch.setattr(replacing, "_exchange", exchange)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(other, saved)
    assert_same(from_pretrained(saved), other if done else model)
    assert (saved / "logs" / "a.txt").read_text() == "kept" and list(saved.parent.iterdir()) == [saved]


def test_an_exchange_is_one_step_or_none(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not replacing._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem cannot exchange two directories")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(FileNotFoundError, match="No such file or directory: .*a' -> .*absent"):
        replacing._exchange(tmp_path / "a", tmp_path / "absent")
    monkeypatch.setattr(replacing, "CANNOT_EXCHANGE", (errno.ENOENT,))
    assert not replacing._exchange(tmp_path / "a", tmp_path / "absent")
    monkeypatch.setattr(replacing.sys, "platform", "darwin")
    assert not replacing._exchange(tmp_path / "a", tmp_path / "b")


def test_a_file_is_no_directory(model, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, not a directory to write into"):
        save_pretrained(model, tmp_path / "model")


def test_there_are_two_layouts(model, tmp_path):
    with pytest.raises(ValueError, match="no layout 'gguf'; there are original, transformers"):
        save_pretrained(model, tmp_path, layout="gguf")


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_the_umask_decides_who_may_read_what_is_written(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        save_pretrained(model, tmp_path / "model", max_shard_size=200_000)
        (tmp_path / "model" / "secret").write_text("")
        (tmp_path / "model" / "secret").chmod(0o600)
        save_pretrained(model, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes.pop("secret") == 0o600
    assert len(modes) == 2 and set(modes.values()) == {0o666 & ~umask}


def test_other_errors_in_the_block_leave_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing_directory(tmp_path / "run") as fresh:
        (fresh / "a").write_text("")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "num_files"), [("1GB", 1), ("0.2 mb", 4), ("200KiB", 4), (2e5, 4), (10**9, 1)])
def test_the_size_of_files_may_have_a_unit(model, tmp_path, size, num_files):
    save_pretrained(model, tmp_path / "model", max_shard_size=size)
    assert len([*tmp_path.glob("model/*.safetensors")]) >= num_files > (num_files > 1)
    assert_same(from_pretrained(tmp_path / "model"), model)


@pytest.mark.parametrize("size", [0, -1, float("nan"), "5", "5 parsecs", "0GB", "1.2.3GB", None, True])
def test_what_is_no_size_is_refused(model, tmp_path, size):
    with pytest.raises(ValueError, match=f"max_shard_size {re.escape(repr(size))} is neither a positive number nor"):
        save_pretrained(model, tmp_path / "model", max_shard_size=size)
    assert not [*tmp_path.iterdir()]


def test_a_compiled_model_is_written_as_what_it_wraps(saved, model, tmp_path):
    save_pretrained(torch.compile(model), tmp_path / "compiled")
    assert snapshot(tmp_path / "compiled") == snapshot(saved)
