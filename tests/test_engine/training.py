"""Tiny training runs of the embedded set, in this process or in one of its own, and faults."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from torch.utils.data import get_worker_info

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs/deeplabv3/deeplabv3_r18_bcn_300_shapes-128x128.py"
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(40, 40), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(32, 32)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]


def tiny_config(work_dir: Path, iters: int = 8, workers: int = 0, **options: Any) -> Config:
    """A config of a few fast iterations: random crops and colours, dropout, saved at every 3rd."""
    cfg = Config.fromfile(BASE)
    loader = dict(num_workers=workers, persistent_workers=workers > 0)
    cfg.merge_from_dict(
        dict(
            model=dict(
                backbone=dict(base_channels=8, stem_channels=8),
                decode_head=dict(in_channels=64, channels=16, dropout_ratio=0.5),
                auxiliary_head=dict(in_channels=32, channels=16),
            ),
            # 5 images in batches of 2: passes end within batches
            train_dataloader=dict(
                batch_size=2, dataset=dict(num_images=5, size=(40, 40)), **loader
            ),
            val_dataloader=dict(dataset=dict(num_images=2, size=(32, 32)), **loader),
            train_cfg=dict(max_iters=iters, val_interval=4),
            default_hooks=dict(checkpoint=dict(interval=3), logger=dict(interval=1)),
            randomness=dict(seed=0, deterministic=True),
            work_dir=str(work_dir),
            runner_type="mmbcn.NormRunner",
        )
    )
    cfg.train_dataloader.dataset.pipeline = PIPELINE
    cfg.model.data_preprocessor.size = (32, 32)
    cfg.merge_from_dict(options)
    return cfg


def train_here(cfg: Config, name: str) -> None:
    """Train in this process. The name keeps mmengine's global objects of the runs apart."""
    from mmbcn.engine import NormRunner

    cfg.experiment_name = name
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: the number decides the order of sums
    try:
        with patch("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, False)):  # 0.3 s
            NormRunner.from_cfg(cfg).train()
    finally:
        torch.set_num_threads(threads)


def command(cfg: Config, *args: object) -> list[str]:
    """The command that trains a config with the real tool."""
    path = Path(cfg.work_dir).with_suffix(".py")
    cfg.dump(path)
    tool = [sys.executable, "tools/train.py", str(path)]
    return [*tool, "--work-dir", cfg.work_dir, *map(str, args)]


def environment() -> dict[str, str]:
    """Finds the package and this module, and computes alike on any number of cores."""
    paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
    return dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1")


def train(cfg: Config, *args: object, **options: Any) -> tuple[int, str]:
    """Train in a process; its exit code and what it printed."""
    done = subprocess.run(
        command(cfg, *args),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=160,
        **options,
    )
    return done.returncode, done.stdout


def saved(work_dir: Path, iters: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, statistics, the optimizer's."""
    content = torch.load(work_dir / f"iter_{iters}.pth", weights_only=False)
    tensors = dict(content["state_dict"])
    for index, state in content["optimizer"]["state"].items():
        tensors |= {f"optimizer {index} {key}": value for key, value in state.items()}
    return tensors


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} differ: {different[:5]}"


class Fault(Hook):
    """Strikes after an iteration, or while its checkpoint is being written.

    Args:
        iters: after how many iterations.
        what: 'raise', a signal's name, or an errno's name for the file system to fail with.
        where: 'train', 'write' (half a checkpoint is written), or 'val' (its first image).
        rank: of which process.
    """

    def __init__(self, iters: int, what: str, where: str = "train", rank: int = 0) -> None:
        self.iters, self.what, self.where, self.rank = iters, what, where, rank

    def strike(self) -> None:
        if self.what == "raise":
            raise RuntimeError("struck")
        if hasattr(errno, self.what):
            code = getattr(errno, self.what)
            raise OSError(code, os.strerror(code))
        os.kill(os.getpid(), getattr(signal, self.what))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        assert get_worker_info() is None
        if (runner.iter + 1, runner.rank) != (self.iters, self.rank):
            return
        if self.where == "train":
            self.strike()
        elif self.where == "write":
            put = LocalBackend.put

            def put_half(backend, content, path):
                put(backend, content[: len(content) // 2], path)
                self.strike()

            LocalBackend.put = put_half

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.where == "val" and (runner.iter, runner.rank) == (self.iters, self.rank):
            self.strike()
