"""Jobs of two processes, as tools/dist_train.sh starts them: one rank dies, or is asked to end."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("mmseg")

from training import ROOT, assert_identical, command, environment, saved, tiny_config

pytestmark = pytest.mark.slow


def job(cfg, *args):
    """The exit code of a job, what it printed, and the seconds it took."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    path = command(cfg)[2]
    tool = ["bash", "tools/dist_train.sh", path, "2", "--norm", "syncbcn"]
    begin = time.monotonic()
    done = subprocess.run(
        [*tool, "--work-dir", cfg.work_dir, *args],
        cwd=ROOT,
        env=dict(environment(), PYTHON=sys.executable, PORT=str(port)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=160,
    )
    return done.returncode, done.stdout, time.monotonic() - begin


def config(work_dir, workers=0, **fault):
    cfg = tiny_config(work_dir, iters=6, workers=workers)
    cfg.pop("norm", None)
    cfg.env_cfg.dist_cfg.backend = "gloo"
    cfg.custom_hooks = [dict(type="training.Fault", **fault)] if fault else []
    return cfg


@pytest.mark.parametrize("rank", [0, 1])
def test_dying_rank_ends_the_job(tmp_path, rank):
    code, out, seconds = job(config(tmp_path, what="SIGKILL", iters=2, rank=rank))
    assert code != 0
    assert "Signal 9 (SIGKILL)" in out
    assert seconds < 60, seconds  # with the start of the processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted job ends with."""
    work = tmp_path_factory.mktemp("ranks") / "whole"
    code, out, _ = job(config(work))
    assert code == 0, out[-3000:]
    return saved(work, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_job_that_died_is_resumed_bit_by_bit(tmp_path, whole, workers):
    """Each rank has generators, statistics and a data order of its own."""
    code, out, _ = job(config(tmp_path / "died", workers, what="SIGKILL", iters=5, rank=1))
    assert code != 0
    code, out, _ = job(config(tmp_path / "died", workers), "--resume")
    assert code == 0, out[-3000:]
    assert re.search("resumed epoch: 0, iter: [34]", out)
    assert_identical(saved(tmp_path / "died", 6), whole)


def test_one_rank_is_asked_to_end(tmp_path, whole):
    """Both stop after the same iteration; resumed, the job ends as if it had not been stopped."""
    code, out, _ = job(config(tmp_path / "asked", what="SIGTERM", iters=4, rank=1))
    assert code != 0
    assert f"Asked to end (SIGTERM) after iteration 4; saved: {tmp_path}/asked/iter_4.pth" in out
    assert f"{os.sep}iter_4.pth" in (tmp_path / "asked/last_checkpoint").read_text()
    code, out, _ = job(config(tmp_path / "asked"), "--resume")
    assert code == 0, out[-3000:]
    assert "resumed epoch: 0, iter: 4" in out
    assert_identical(saved(tmp_path / "asked", 6), whole)
