"""The tools of tools/datasets, run as a user runs them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")

from mmbcn.datasets import write_shapes

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "camvid": "configs/deeplabv3/deeplabv3_r18_bcn_2k_camvid-360x480.py",
    "cityscapes": "configs/deeplabv3/deeplabv3_r18_bcn_40k_cityscapes-512x1024.py",
    "voc": "configs/deeplabv3/deeplabv3_r18_bcn_20k_voc12aug-512x512.py",
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a tool in this process; give its exit code and what it printed, the error included."""

    def run_tool(tool, *args):
        path = ROOT / "tools/datasets" / tool
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        monkeypatch.delitem(sys.modules, "_common", raising=False)
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        out = capsys.readouterr().out
        return (1, out + code) if isinstance(code, str) else (int(code), out)

    return run_tool


def set_root(root, splits=("train", "val", "test")):
    return ["--cfg-options", *(f"{s}_dataloader.dataset.data_root={root}" for s in splits)]


def test_cityscapes_goes_on_where_it_ended(tmp_path, run):
    write_shapes(tmp_path, "cityscapes", 3, 2, size=(48, 64), raw=True)
    truth = {p: np.asarray(Image.open(p)) for p in tmp_path.rglob("*_labelTrainIds.png")}
    first, second, *_ = sorted(truth)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])
    code, out = run("cityscapes.py", tmp_path, "--workers", 1)
    assert code == 0
    assert out == "train ids: 2 written, 3 there already, 0 failed\nnow there: 3 train, 2 val\n"
    for path, label in truth.items():
        np.testing.assert_array_equal(np.asarray(Image.open(path)), label)


def test_failed_files_are_named_and_end_with_1(tmp_path, run):
    write_shapes(tmp_path, "cityscapes", 2, 1, size=(48, 64), raw=True)
    for path in tmp_path.rglob("*_labelTrainIds.png"):
        path.unlink()
    bad = min(tmp_path.rglob("*_polygons.json"))
    bad.write_text("{")
    code, out = run("cityscapes.py", tmp_path, "--source", "polygons", "--workers", 2)
    assert code == 1
    assert "2 written, 0 there already, 1 failed" in out
    assert f"{bad}: expected JSON" in out


def test_voc_aug_makes_what_the_config_reads(tmp_path, run):
    voc = tmp_path / "VOCdevkit/VOC2012"
    write_shapes(voc, "voc", 3, 2, size=(48, 64), raw=True)
    for path in (voc / "SegmentationClassAug").iterdir():
        path.unlink()
    (voc / "ImageSets/Segmentation/aug.txt").unlink()
    code, out = run("voc_aug.py", tmp_path / "VOCdevkit", voc / "benchmark_RELEASE")
    assert code == 0, out
    assert "trainaug.txt: 6 images (published: 10582)" in out
    roots = [f"train_dataloader.dataset.datasets.{i}.data_root={voc}" for i in (0, 1)]
    args = ["--split", "train", "--workers", 1, "--cfg-options", *roots]
    code, out = run("check.py", CONFIGS["voc"], *args)
    assert code == 0, out
    assert "== train.0: 3 samples of PascalVOCDataset" in out
    assert "== train.1: 3 samples of PascalVOCDataset" in out


def test_camvid_makes_what_the_config_reads(tmp_path, run):
    write_shapes(tmp_path / "scenes", "camvid", 2, 1, size=(48, 64))
    for split, names in dict(
        train=("0001TP_006690", "0001TP_006720"), val=("0016E5_07959",)
    ).items():
        for kind, target in (("images", split), ("annotations", f"{split}annot")):
            (tmp_path / "segnet" / target).mkdir(parents=True)
            files = sorted((tmp_path / "scenes" / kind / split).iterdir())
            for name, file in zip(names, files, strict=True):
                Image.open(file).save(tmp_path / f"segnet/{target}/{name}.png")
    code, out = run("camvid.py", tmp_path / "segnet", "--out", tmp_path / "out", "--workers", 1)
    assert code == 0, out
    assert "6 written, 0 there already, 0 failed\nnow there: 2 train, 1 val" in out
    code, out = run("check.py", CONFIGS["camvid"], "--workers", 1, *set_root(tmp_path / "out"))
    assert code == 0, out
    assert "== train: 2 samples of CamVidDataset" in out


@pytest.mark.parametrize(
    ("tool", "args", "message"),
    [
        ("cityscapes.py", ["{0}"], "error: expected gtFine_trainvaltest.zip unpacked"),
        ("voc_aug.py", ["{0}", "{0}"], "error: {0}/ImageSets/Segmentation/train.txt, "),
        ("camvid.py", ["{0}"], "error: expected 701_StillsRaw_full"),
        ("check.py", ["{0}/none.py"], "error: there is no config {0}/none.py"),
        (
            "check.py",
            [CONFIGS["camvid"], *set_root("{0}/nowhere")],
            "error: CamVidDataset (train): the folder {0}/nowhere/images/train",
        ),
    ],
)
def test_mistakes_end_in_one_message(tmp_path, run, tool, args, message):
    code, out = run(tool, *(arg.format(tmp_path) for arg in args))
    assert code == 1
    assert message.format(tmp_path) in out
    assert not list(tmp_path.iterdir())


def test_check_writes_report_pictures_and_lists(tmp_path, run):
    write_shapes(tmp_path / "set", "cityscapes", 4, 2, size=(48, 64))
    broken = min((tmp_path / "set/leftImg8bit/train/shapes").iterdir())
    broken.write_bytes(broken.read_bytes()[:500])
    args = [CONFIGS["cityscapes"], "--workers", 1, "--show-dir", tmp_path / "show"]
    args += ["--fix-list", tmp_path / "good.txt", *set_root(tmp_path / "set")]
    code, out = run("check.py", *args)
    assert code == 1
    assert f"ERROR: unreadable image (1)\n    {broken}: damaged or truncated" in out
    assert {path.name for path in (tmp_path / "show").iterdir()} == {
        "report.txt",
        *(f"{s}_{kind}.png" for s in ("train", "val") for kind in ("overlays", "classes")),
    }
    report = (tmp_path / "show/report.txt").read_text()
    assert "1 errors, 2 warnings" in report
    assert report in out
    good = f"train_dataloader.dataset.ann_file={tmp_path / 'good_train.txt'}"
    code, out = run(
        "check.py", CONFIGS["cityscapes"], "--workers", 1, *set_root(tmp_path / "set"), good
    )
    assert code == 0, out
    assert "== train: 3 samples" in out


def test_check_runs_from_a_shell_in_several_processes(tmp_path):
    write_shapes(tmp_path, "camvid", 3, 2, size=(48, 64))
    (tmp_path / "annotations/train/shapes_000001_000000.png").unlink()
    args = [CONFIGS["camvid"], "--split", "train", "--workers", 2, *set_root(tmp_path)]
    done = subprocess.run(
        [sys.executable, "tools/datasets/check.py", *map(str, args)],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "ERROR: missing label (1)" in done.stdout
    assert "shapes_000001_000000.png" in done.stdout
    assert "Only train was examined" in done.stdout
    assert "Traceback" not in done.stderr
