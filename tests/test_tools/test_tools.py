"""The tools, run as a user runs them, on a tiny embedded set."""

import os
import subprocess
import sys
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
    "val_dataloader.dataset.num_images=2",
    "val_dataloader.dataset.size=(64,64)",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "test_dataloader.dataset.num_images=2",
    "test_dataloader.dataset.size=(64,64)",
    "train_cfg.max_iters=2",
    "train_cfg.val_interval=2",
    "default_hooks.checkpoint.interval=2",
    "default_hooks.logger.interval=1",
]


def run(*args: object, cwd: Path = ROOT) -> tuple[int, str]:
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work_dir with a BCN checkpoint after two steps."""
    work = tmp_path_factory.mktemp("work")
    code, out = run(
        "tools/train.py", CONFIG, "--work-dir", work, "--seed", 0, "--cfg-options", *TINY
    )
    assert code == 0, out
    assert "mIoU" in out
    assert (work / "iter_2.pth").is_file()
    return work


def test_dumped_config_is_the_switched_one(tmp_path):
    options = [*TINY, "train_cfg.val_interval=10"]
    args = ["--norm", "gn_ws", "--work-dir", tmp_path, "--cfg-options", *options]
    code, out = run("tools/train.py", CONFIG, *args)
    assert code == 0, out
    dumped = (tmp_path / Path(CONFIG).name).read_text()
    assert "mmbcn.AutoGroupNorm" in dumped
    assert "mmbcn.WSConv2d" in dumped
    assert "mmbcn.BCN" not in dumped


def test_test_writes_table_pictures_and_label_maps(trained, tmp_path):
    out_dir, show = tmp_path / "out", tmp_path / "show"
    args = [CONFIG, trained / "iter_2.pth", "--work-dir", tmp_path / "w"]
    args += ["--out", out_dir, "--show-dir", show]
    code, out = run("tools/test.py", *args, "--cfg-options", *TINY)
    assert code == 0, out
    assert "mIoU" in out
    assert len(list(show.glob("*.png"))) == 2
    assert len(list(out_dir.glob("*.png"))) == 2


@pytest.mark.parametrize("name", ["bn", "bcn_ws", "gn"])
def test_checkpoint_of_another_norm_stops(trained, tmp_path, name):
    args = [CONFIG, trained / "iter_2.pth", "--norm", name, "--work-dir", tmp_path]
    code, out = run("tools/test.py", *args, "--cfg-options", *TINY)
    assert code == 1
    assert "error: the checkpoint is of another norm than the config" in out
    assert "Traceback" not in out


def test_tta_runs(trained, tmp_path):
    args = [CONFIG, trained / "iter_2.pth", "--tta", "--work-dir", tmp_path]
    code, out = run("tools/test.py", *args, "--cfg-options", *TINY)
    assert code == 0, out
    assert "mIoU" in out


def test_resume_continues(trained):
    args = ["--work-dir", trained, "--resume", "--cfg-options", *TINY, "train_cfg.max_iters=4"]
    code, out = run("tools/train.py", CONFIG, *args)
    assert code == 0, out
    assert "resumed" in out
    assert (trained / "iter_4.pth").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["configs/deeplabv3_r101_bcn.py"], "the folder data/nowhere"),
        ([CONFIG, "--norm", "bnc"], "unknown norm 'bnc'"),
        (["configs/none.py"], "there is no config configs/none.py"),
    ],
)
def test_mistakes_end_in_one_message(tmp_path, args, message):
    options = []
    if "cityscapes" in args[0] or args[0].endswith("r101_bcn.py"):
        options = ["train_dataloader.dataset.data_root=data/nowhere", "model.backbone.depth=18"]
        options += ["model.decode_head.in_channels=512", "model.auxiliary_head.in_channels=256"]
        options = ["--cfg-options", *options]
    code, out = run("tools/train.py", *args, "--work-dir", tmp_path, *options)
    assert code == 1
    assert message in out
    assert "error: " in out
    assert "Traceback" not in out


def test_label_outside_the_classes_names_file_and_values(tmp_path):
    options = [*TINY, "model.decode_head.num_classes=3", "model.auxiliary_head.num_classes=3"]
    args = ["--work-dir", tmp_path, "--cfg-options", *options]
    code, out = run("tools/train.py", CONFIG, *args)
    assert code == 1
    assert "_label.png has the label values" in out
    assert "Traceback" not in out


def test_missing_file_is_named(tmp_path):
    data = tmp_path / "camvid"
    write = ["--layout", "camvid", "--out", data, "--train", 3, "--val", 2, "--size", "64x96"]
    code, out = run("tools/datasets/shapes.py", *write)
    assert code == 0, out
    victim = next((data / "annotations/train").glob("*.png"))
    victim.unlink()
    config = "configs/deeplabv3/deeplabv3_r18_bcn_2k_camvid-360x480.py"
    roots = [f"{s}_dataloader.dataset.data_root={data}" for s in ("train", "val", "test")]
    workers = [f"{s}_dataloader.{k}" for s in ("train", "val") for k in ("num_workers=0",)]
    workers += [f"{s}_dataloader.persistent_workers=False" for s in ("train", "val")]
    args = ["--work-dir", tmp_path / "w", "--cfg-options", *roots, *workers]
    code, out = run("tools/train.py", config, *args)
    assert code == 1
    assert victim.name in out
    assert "Traceback" not in out


def test_print_config_shows_the_switched_one():
    code, out = run("tools/print_config.py", CONFIG, "--norm", "microbcn_ws")
    assert code == 0, out
    assert "mmbcn.MicroBCN" in out
    assert "mmbcn.WSConv2d" in out


def test_foreign_config_by_runner_type(tmp_path):
    """Mmseg's own tool and config, switched by two options; custom_imports not needed."""
    import mmseg

    mim = Path(mmseg.__path__[0]) / ".mim"
    config = mim / "configs/fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py"
    pipeline = (
        "[dict(type='LoadImageFromFile'),dict(type='LoadAnnotations'),dict(type='PackSegInputs')]"
    )
    child = tmp_path / "child.py"
    child.write_text(
        f"_base_ = '{config}'\n"
        f"data = dict(type='mmbcn.ShapesDataset', num_images=2, size=(64, 64),\n"
        f"    pipeline={pipeline})\n"
        "train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False,\n"
        "    dataset=dict(_delete_=True, **data))\n"
        "val_dataloader = None\nval_cfg = None\nval_evaluator = None\n"
        "test_dataloader = None\ntest_cfg = None\ntest_evaluator = None\n"
        "model = dict(pretrained=None, data_preprocessor=dict(size=(64, 64)))\n"
        "train_cfg = dict(max_iters=1)\n"
    )
    args = ["--work-dir", tmp_path / "w", "--cfg-options", "runner_type=mmbcn.NormRunner"]
    code, out = run(mim / "tools/train.py", child, *args, "norm=bcn_ws")
    assert code == 0, out[-3000:]
    assert "mmbcn.BCN" in (tmp_path / "w/child.py").read_text()


@pytest.mark.slow
def test_two_ranks_on_cpus_train_and_test(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "PORT": "29637", "OMP_NUM_THREADS": "1"}
    options = ["--norm", "syncbcn", "--work-dir", str(tmp_path), "--cfg-options", *TINY]

    def launch(*args):
        command = ["bash", *map(str, args), *options]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    done = launch("tools/dist_train.sh", CONFIG, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    done = launch("tools/dist_test.sh", CONFIG, tmp_path / "iter_2.pth", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mIoU" in done.stdout + done.stderr
