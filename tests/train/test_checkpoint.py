"""Checkpoints that survive kills, full disks and torn files."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from linattn.train import checkpoint


def writer(size=100):
    return lambda folder: [(folder / name).write_bytes(b"x" * size) for name in ("model.safetensors", "optimizer.safetensors")]


def save(root, step, keep=2, write=None):
    return checkpoint.save(root, step, {"what": "a test"}, write or writer(), keep=keep)


def names(root):
    return sorted(entry.name for entry in root.iterdir())


def test_saved_found_and_rotated(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    said = []
    found = checkpoint.newest(tmp_path, said.append)
    assert (found.step, found.facts, said) == (15, {"what": "a test"}, [])


def test_keep_one_never_leaves_none(tmp_path):
    save(tmp_path, 1, keep=1)

    def write(folder):
        assert checkpoint.newest(tmp_path, print).step == 1  # still there while the next is written
        writer()(folder)

    save(tmp_path, 2, keep=1, write=write)
    assert names(tmp_path) == ["step-00000002"]


def test_a_full_disk_keeps_the_old_one_and_says_so(tmp_path):
    save(tmp_path, 5)

    def full(folder):
        (folder / "model.safetensors").write_bytes(b"x" * 10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(checkpoint.SaveError, match=r"could not save step 10 .*No space left on device; .*step-00000005 is as it was"):
        save(tmp_path, 10, write=full)
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 5
    save(tmp_path, 10)
    assert checkpoint.newest(tmp_path, pytest.fail).step == 10


def test_a_full_disk_at_the_first_save_says_there_is_none(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.SaveError, match="No space left on device; there is no earlier one"):
        save(tmp_path, 10)
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["files", "marker"])
def test_a_kill_during_a_save_leaves_the_old_one(tmp_path, moment):
    """SIGKILL while the files are written, and between them and the marker."""
    save(tmp_path, 5)
    script = f"""
import time
from pathlib import Path
from linattn.train import checkpoint
def stall(*_):
    print("here", flush=True)
    time.sleep(60)
def write(folder):
    (folder / "model.safetensors").write_bytes(b"y" * 50)
    {"stall()" if moment == "files" else "checkpoint.sync = stall"}
checkpoint.save(Path({str(tmp_path)!r}), 10, {{}}, write, keep=1)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert names(tmp_path) == [".step-00000010.partial", "step-00000005"]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 5
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def tear_marker(folder):
    (folder / checkpoint.MARKER).write_text('{"step": 1')


@pytest.mark.parametrize(
    "tear, said",
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40), "model.safetensors has 40 bytes where 100 were written"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda folder: (folder / checkpoint.MARKER).unlink(), "it has no complete.json, so its writing was cut short"),
        (tear_marker, "its complete.json cannot be read"),
        (lambda folder: (folder / checkpoint.MARKER).write_text("[]"), "its complete.json cannot be read"),
    ],
)
def test_a_torn_one_is_skipped_with_a_reason(tmp_path, tear, said):
    save(tmp_path, 5)
    save(tmp_path, 10)
    tear(tmp_path / "step-00000010")
    messages = []
    assert checkpoint.newest(tmp_path, messages.append).step == 5
    assert len(messages) == 1 and "skipping" in messages[0] and "step-00000010" in messages[0] and said in messages[0]
    with pytest.raises(ValueError, match="step-00000010 is torn: "):
        checkpoint.find(tmp_path / "step-00000010", print)
    assert checkpoint.find(tmp_path, print) == tmp_path / "step-00000005"
    save(tmp_path, 10)  # and written again in its place
    assert checkpoint.newest(tmp_path, pytest.fail).step == 10


def test_find_takes_a_run_a_checkpoint_or_a_plain_model(tmp_path):
    at = save(tmp_path / "run", 3).path
    assert checkpoint.find(at, print) == at == checkpoint.find(tmp_path / "run", print)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert checkpoint.find(tmp_path, print) == tmp_path


def test_find_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        checkpoint.find(tmp_path / "nowhere", print)
    with pytest.raises(ValueError, match="holds neither a model nor a complete checkpoint"):
        checkpoint.find(tmp_path, print)
