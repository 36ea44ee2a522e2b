"""Checkpoint files: whole or not there; and which one a run is resumed from."""

import errno
import logging
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")

from mmbcn.checkpoints.write import whole_file
from mmbcn.engine import SafeCheckpointHook
from mmbcn.engine.saving import check_resumable, find_checkpoint
from mmbcn.errors import UsageError

LOGGER = logging.getLogger("saving")
CONTENT = dict(meta=dict(epoch=0, iter=4), state_dict={}, message_hub={}, optimizer={})


def write(path, broken=False, **content):
    torch.save({**CONTENT, **content}, path)
    if broken:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    os.utime(path, (len(path.name), int(path.stem.rpartition("_")[2] or 0)))  # newer, if later
    return path


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path, "file") as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """A machine that stops after the rename must not have an empty file under the name."""
    path, done = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(f"/proc/self/fd/{fd}").readlink()))
    with whole_file(path, "file") as part:
        part.write_text("new")
    assert done == [tmp_path / "file.part", tmp_path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_failure_leaves_the_old_file(tmp_path, code):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with whole_file(path, "list") as part:
            part.write_text("ne")
            raise OSError(code, os.strerror(code))

    message = f"could not write the list {path}: {os.strerror(code)}"
    with pytest.raises(UsageError, match=re.escape(message)):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_last_checkpoint_is_followed(tmp_path):
    write(tmp_path / "iter_8.pth")
    older = write(tmp_path / "iter_4.pth")
    (tmp_path / "last_checkpoint").write_text(f"{older}\n")
    assert find_checkpoint(tmp_path, LOGGER) == str(older)


def test_work_dir_that_moved(tmp_path):
    path = write(tmp_path / "iter_4.pth")
    (tmp_path / "last_checkpoint").write_text("work_dirs/elsewhere/iter_4.pth")
    assert find_checkpoint(tmp_path, LOGGER) == str(path)


def test_remote_checkpoint_is_left_to_mmengine(tmp_path):
    (tmp_path / "last_checkpoint").write_text("s3://bucket/iter_4.pth")
    assert find_checkpoint(tmp_path, LOGGER) == "s3://bucket/iter_4.pth"


@pytest.mark.parametrize("pointer", [None, "", "iter_12.pth", "iter_20.pth"])
def test_newest_whole_one_stands_in(tmp_path, caplog, pointer):
    """The pointer is missing, empty, names a file that is cut short, or one that is not there."""
    write(tmp_path / "iter_4.pth")
    wanted = write(tmp_path / "iter_8.pth")
    write(tmp_path / "iter_12.pth", broken=True)
    torch.save(dict(meta=dict(epoch=0, iter=12), state_dict={}), tmp_path / "best_mIoU_iter_12.pth")
    (tmp_path / "iter_16.pth.part").write_bytes(b"PK")
    if pointer is not None:
        (tmp_path / "last_checkpoint").write_text(pointer)
    assert find_checkpoint(tmp_path, LOGGER) == str(wanted)
    assert "iter_12.pth is no checkpoint that can be read: it is cut short" in caplog.text
    assert f"Resumes from {wanted}" in caplog.text
    assert not (tmp_path / "iter_16.pth.part").exists()


def test_nothing_that_can_be_resumed(tmp_path):
    assert find_checkpoint(tmp_path, LOGGER) is None
    assert find_checkpoint(tmp_path / "none", LOGGER) is None
    write(tmp_path / "iter_4.pth", broken=True)
    with pytest.raises(UsageError, match=r"none of the 1 checkpoints .* choose another --work-dir"):
        find_checkpoint(tmp_path, LOGGER)


@pytest.mark.parametrize("key", [*CONTENT, "meta.iter"])
def test_foreign_checkpoint_is_refused_by_name(tmp_path, key):
    content = {**CONTENT, "meta": dict(CONTENT["meta"])}
    (content["meta"] if "." in key else content).pop(key.rpartition(".")[2])
    path = tmp_path / "resnet50.pth"
    torch.save(content, path)
    with pytest.raises(UsageError, match=rf"resnet50\.pth: it has no .*{key}"):
        check_resumable(path)


def test_metric_that_no_validation_has():
    hook = SafeCheckpointHook(save_best="mIoUU")
    with pytest.raises(UsageError, match=r"save_best='mIoUU'.*did you mean 'mIoU'\? It has"):
        hook._save_best_checkpoint(None, dict(mIoU=1.0, aAcc=2.0))
