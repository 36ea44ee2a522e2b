"""The comparison tool, run as a user runs it, on a tiny embedded set."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

ROOT = Path(__file__).parents[2]
CONFIG = "configs/deeplabv3/deeplabv3_r18_bcn_300_shapes-128x128.py"
TINY = [
    "model.backbone.base_channels=8",
    "model.backbone.stem_channels=8",
    "model.decode_head.in_channels=64",
    "model.decode_head.channels=16",
    "model.auxiliary_head.in_channels=32",
    "model.auxiliary_head.channels=16",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "train_dataloader.dataset.num_images=8",
    "train_dataloader.dataset.size=(64,64)",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "val_dataloader.dataset.num_images=5",
    "val_dataloader.dataset.size=(64,64)",
]


def start(out: Path, *args: object) -> subprocess.Popen:
    command = [sys.executable, "tools/analysis/compare_norms.py", CONFIG, "--out", out, *args]
    return subprocess.Popen(
        [*map(str, command), "--cfg-options", *TINY],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background jobs are started with it ignored, and the tests may be one
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def run(out: Path, *args: object) -> tuple[int, str]:
    process = start(out, *args)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def results(out: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in out.glob("runs/*/result.json"))
    return {result["run"]["norm"]: result for result in found}


def test_mistake_ends_in_one_message(tmp_path):
    code, out = run(tmp_path / "out", "--norms", "bn,bcm")
    assert code == 1
    assert "error: unknown norm 'bcm'; did you mean 'bcn'" in out
    assert "Traceback" not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compares_norms(tmp_path):
    args = ["--norms", "bn,bcn", "--batch-sizes", "1", "--seeds", "1", "--iters", "2"]
    code, out = run(tmp_path, *args)
    assert code == 0, out
    assert "failed: Expected more than 1 value per channel" in out
    found = results(tmp_path)
    assert found["bn"]["status"] == "failed"
    assert "use --norm bcn" in found["bn"]["reason"]
    bcn = found["bcn"]
    # the evaluator counts pixels in its own way, and rounds
    assert bcn["miou"] == pytest.approx(bcn["metrics"]["mIoU"], abs=0.0051)
    assert bcn["images_tested"] == 5
    assert len(bcn["curve"]["loss"]) == 2
    assert 2**26 < bcn["process_bytes"] < 2**34
    assert bcn["singularity"]["iter"] == [1, 2]
    assert len(list(tmp_path.glob("images/*"))) == 8
    assert len(list(tmp_path.glob("runs/bcn*/predictions/*.png"))) == 4
    assert f"wrote {tmp_path / 'report.html'}" in out
    assert "Only bcn came to its end" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    code, out = run(tmp_path, "--report-only")
    assert code == 0, out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_interrupted_comparison_ends_as_if_it_had_not_been(tmp_path):
    args = ["--norms", "microbcn_ws", "--batch-sizes", "2", "--seeds", "1", "--iters", "40"]
    code, out = run(tmp_path / "whole", *args)
    assert code == 0, out
    broken = tmp_path / "broken"
    for number, wanted in ((signal.SIGTERM, 130), (signal.SIGINT, 130)):
        process = start(broken, *args)
        seen = len(list(broken.glob("runs/*/work/*/vis_data/scalars.json")))
        while len(list(broken.glob("runs/*/work/*/vis_data/scalars.json"))) == seen:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == wanted, output
        assert not results(broken)
        assert list(broken.glob("runs/*/work/iter_*.pth"))
    code, out = run(broken, *args)
    assert code == 0, out
    whole, resumed = results(tmp_path / "whole"), results(broken)
    for key in ("miou", "class_iou", "singularity"):
        assert resumed["microbcn_ws"][key] == whole["microbcn_ws"][key]
    assert resumed["microbcn_ws"]["curve"]["lr"] == whole["microbcn_ws"]["curve"]["lr"]
    code, out = run(broken, *args)
    assert code == 0
    assert "microbcn_ws-b2" not in out.replace(str(broken), "")  # nothing was run
