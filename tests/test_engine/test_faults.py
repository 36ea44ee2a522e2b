"""What a run leaves behind when it is killed, asked to end, or out of disk: injected faults."""

import os
import re
import resource
import signal
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

from training import (
    ROOT,
    assert_identical,
    command,
    environment,
    saved,
    tiny_config,
    train,
    train_here,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run ends with."""
    work = tmp_path_factory.mktemp("whole")
    train_here(tiny_config(work), "whole")
    return saved(work, 8)


def strike(cfg, **fault):
    cfg.custom_hooks = [dict(type="training.Fault", **fault)]
    result = train(cfg)
    cfg.custom_hooks = []
    return result


def test_killed_while_a_checkpoint_is_written(tmp_path, whole):
    cfg = tiny_config(tmp_path)
    code, out = strike(cfg, what="SIGKILL", iters=6, where="write")
    assert code == -9, out[-3000:]
    # the schedule keeps one checkpoint (max_keep_ckpts=1): it must not be gone before the next
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_4.pth")
    assert saved(tmp_path, 4)
    assert (tmp_path / "iter_6.pth.part").exists()
    assert not (tmp_path / "iter_6.pth").exists()
    code, out = train(cfg, "--resume")
    assert code == 0, out[-3000:]
    assert "resumed epoch: 0, iter: 4" in out
    assert_identical(saved(tmp_path, 8), whole)
    assert not list(tmp_path.glob("*.part"))


def test_full_disk_ends_in_one_message(tmp_path, whole):
    cfg = tiny_config(tmp_path)
    code, out = strike(cfg, what="ENOSPC", iters=6, where="write")
    assert code == 1
    assert f"error: could not write the checkpoint {tmp_path}/iter_6.pth: No space left on" in out
    assert "Traceback" not in out
    assert {path.name for path in tmp_path.glob("*.pth*")} == {"best_mIoU_iter_4.pth", "iter_4.pth"}
    code, out = train(cfg, "--resume")
    assert code == 0, out[-3000:]
    assert_identical(saved(tmp_path, 8), whole)


def test_file_that_may_not_grow(tmp_path):
    """The system itself refuses: a limit on the size of files, below that of a checkpoint."""
    limit = 1 << 20
    code, out = train(
        tiny_config(tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert code == 1
    assert f"error: could not write the checkpoint {tmp_path}/iter_3.pth: File too large" in out
    assert "Traceback" not in out
    assert not list(tmp_path.glob("*.pth*"))


@pytest.mark.parametrize(("where", "iters"), [("train", 4), ("train", 6), ("val", 4)])
def test_asked_to_end(tmp_path, whole, where, iters):
    """In the middle of the interval, where a checkpoint is due, and within a validation."""
    cfg = tiny_config(tmp_path)
    code, out = strike(cfg, what="SIGTERM", iters=iters, where=where)
    assert code == 143, out[-3000:]
    assert f"Asked to end (SIGTERM) after iteration {iters}; saved: {tmp_path}/iter_{iters}" in out
    assert "Traceback" not in out
    assert "mIoU: " not in out or iters == 6  # not validated at 4
    code, out = train(cfg, "--resume")
    assert code == 0, out[-3000:]
    assert f"resumed epoch: 0, iter: {iters}" in out
    assert_identical(saved(tmp_path, 8), whole)


def test_asked_to_end_with_averaged_weights_in_validation(tmp_path):
    """Validation is of EMA's weights: the checkpoint must not take them for the trained ones."""
    ema = dict(type="EMAHook", momentum=0.1)
    train_here(tiny_config(tmp_path / "a", custom_hooks=[ema]), "averaged")
    cfg = tiny_config(tmp_path / "b")
    cfg.custom_hooks = [ema, dict(type="training.Fault", what="SIGTERM", iters=4, where="val")]
    code, out = train(cfg)
    assert code == 143, out[-3000:]
    cfg.custom_hooks = [ema]
    code, out = train(cfg, "--resume")
    assert code == 0, out[-3000:]
    assert_identical(saved(tmp_path / "b", 8), saved(tmp_path / "a", 8))


def test_whole_process_group_is_asked_to_end(tmp_path, whole):
    """As launchers and schedulers do: loader processes get the signal too, at any time."""
    cfg = tiny_config(tmp_path, iters=60, workers=2)
    with subprocess.Popen(
        command(cfg),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        out = ""
        for line in process.stdout:
            out += line
            if re.search(r"Iter\(train\) \[ *7/", line):
                os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 143, out[-3000:]
    assert "Traceback" not in out
    iters = int(re.search(r"after iteration (\d+); saved", out)[1])
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / f"iter_{iters}.pth")
    cfg = tiny_config(tmp_path, iters=iters + 2, workers=2)
    code, out = train(cfg, "--resume")
    assert code == 0, out[-3000:]
    cfg = tiny_config(tmp_path / "whole", iters=iters + 2)
    train_here(cfg, "whole of the group")
    assert_identical(saved(tmp_path, iters + 2), saved(Path(cfg.work_dir), iters + 2))


def test_foreign_checkpoint_is_refused_on_resuming(tmp_path):
    import torch

    path = tmp_path / "resnet.pth"
    torch.save(dict(state_dict={"conv1.weight": torch.zeros(1)}), path)
    for given in ({"load_from": str(path)}, {}):
        code, out = train(tiny_config(tmp_path, **given), "--resume")
        assert code == 1
        assert f"error: a run cannot be resumed from {path}: it has no meta" in out or (
            "none of the 1 checkpoints" in out and str(path) in out
        )
        assert "Traceback" not in out


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    code, out = train(tiny_config(tmp_path, iters=1), "--resume")
    assert code == 0, out[-3000:]
    assert f"No checkpoint in {tmp_path}: starts anew" in out
