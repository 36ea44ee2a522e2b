"""What users get wrong, and the message: what was expected, what came, what to do.

Layers and functions are called; everything else goes through the tools' own command lines, which
must end in one message instead of a traceback.
"""

import errno
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmbcn import BCN, MicroBCN, SyncBCN, WSConv2d, convert_norm, set_norm
from mmbcn.errors import UsageError
from mmbcn.layers import AffineInstanceNorm, AutoGroupNorm, FrozenBN

ROOT = Path(__file__).parents[1]
DELETE = object()


class Door:
    """What the cases need: a config file that trains in a second, a dataset on disk, the tools."""

    def __init__(self, tmp_path, tiny_config, monkeypatch):
        self.tmp = tmp_path
        self._make = tiny_config
        self._patch = monkeypatch

    def config(self, changes=(), name="config.json", **options):
        """A file with the tiny config; values given as ``key=value``, `DELETE` takes a key out."""
        cfg = self._make(**options)
        cfg.pop("norm")
        set_norm(cfg.model, options.get("norm", "bcn"))
        for key, value in dict(changes).items():
            *path, last = key.split(".")
            node = cfg._cfg_dict
            for part in path:
                node = node[part]
            if value is DELETE:
                del node[last]
            else:
                node[last] = value
        path = self.tmp / name
        path.write_text(json.dumps(cfg.to_dict()))
        return path

    def run(self, tool, *args):
        """Run a tool as ``python tools/<tool>.py ARGS`` does; its last words."""
        self._patch.setattr(sys, "argv", [f"tools/{tool}.py", *map(str, args)])
        self._patch.syspath_prepend(ROOT / "tools")
        self._patch.delitem(sys.modules, "_common", raising=False)
        self._patch.setenv("LOCAL_RANK", "0")
        self._patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # of workers
        try:
            runpy.run_path(str(ROOT / f"tools/{tool}.py"), run_name="__main__")
        except SystemExit as end:
            if str(end.code).startswith("error: "):  # printed by the interpreter, exit code 1
                raise UsageError(end.code) from end
            raise

    def train(self, *args, **config):
        self.run("train", self.config(**config), *args)

    def options(self, *options):
        self.train("--cfg-options", *options)

    def camvid(self, damage, workers=0, **options):
        """Train on files, after ``damage`` has been done to the folder of the training set."""
        from mmbcn.datasets import write_shapes

        root = self.tmp / "camvid"
        write_shapes(root, "camvid", 4, 1, size=(48, 48))
        damage(root)
        dataset = dict(
            type="mmbcn.CamVidDataset",
            data_root=str(root),
            data_prefix=dict(img_path="images/train", seg_map_path="annotations/train"),
            pipeline=[dict(type=t) for t in ("LoadImageFromFile", "LoadAnnotations")]
            + [dict(type="PackSegInputs")],
            **options,
        )
        changes = {"train_dataloader.dataset": dataset, "train_dataloader.num_workers": workers}
        changes |= {f"model.{h}.num_classes": 11 for h in ("decode_head", "auxiliary_head")}
        self.train(changes=changes)


def first(root, kind):
    return min((root / kind / "train").iterdir())


def truncate(kind, keep):
    def damage(root):
        path = first(root, kind)
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def wrong_size(root):
    import cv2

    cv2.imwrite(str(first(root, "annotations")), np.zeros((48, 40), np.uint8))


def wrong_label(root):
    import cv2

    cv2.imwrite(str(first(root, "annotations")), np.full((48, 48), 200, np.uint8))


def other_size(root):
    import cv2

    cv2.imwrite(str(first(root, "images")), np.zeros((64, 64, 3), np.uint8))
    cv2.imwrite(str(first(root, "annotations")), np.zeros((64, 64), np.uint8))


def no_images(root):
    for path in (root / "images/train").iterdir():
        path.rename(path.with_suffix(".jpeg"))


def lose_label(root):
    first(root, "annotations").unlink()


def lose_folder(root):
    (root / "images/train").rename(root / "images/training")


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def load(layer, change):
    state = layer.state_dict()
    change(state)
    layer.load_state_dict(state)


def backend(door, name):
    door._patch.setenv("MMBCN_BACKEND", name)
    BCN(6, 3)(torch.randn(2, 6, 4, 4))


def other_norm(door):
    from mmengine.registry import DefaultScope
    from mmengine.runner import save_checkpoint
    from mmseg.registry import MODELS

    cfg = door._make("bn")
    set_norm(cfg.model, "bn")
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model)
    save_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(door.tmp / "bn.pth"))
    door.run("test", door.config(), door.tmp / "bn.pth")


def write(door, name, text):
    path = door.tmp / name
    path.write_text(text)
    return path


def full_disk(door):
    from mmengine.visualization import LocalVisBackend

    def write(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    door._patch.setattr(LocalVisBackend, "add_scalars", write)
    door.options("default_hooks.logger.interval=1")


def below_a_file(door):
    write(door, "file", "")
    return door.tmp / "file/work"


GROUPS = "counts that would do: 1, 2, 3, 6, or num_groups='auto'"
EPS = "the usual one is 1e-5"
MOMENTUM = "weight of the new value, in [0, 1]"
KINDS = "a tensor of real floating-point numbers, got"

# what the user does, the error, parts of its message
CASES = {
    # layers: input
    "no channels": (lambda d: BCN(6, 3)(x(6)), ValueError, "expects (N, 6, ...), got shape (6,)"),
    "scalar": (lambda d: MicroBCN(6, 3)(x()), ValueError, "expects (N, 6, ...), got shape ()"),
    "wrong channels": (
        lambda d: SyncBCN(6, 3)(x(2, 8, 4, 4)),
        ValueError,
        "SyncBCN expects (N, 6, ...), got shape (2, 8, 4, 4); num_features must be the channels",
    ),
    "wrong channels in eval": (
        lambda d: MicroBCN(6, 3).eval()(x(2, 3, 4, 4)),
        ValueError,
        "MicroBCN expects (N, 6, ...), got shape (2, 3, 4, 4)",
    ),
    "channels last in numpy's order": (
        lambda d: BCN(6, 3)(x(2, 4, 4, 6)),
        ValueError,
        "got shape (2, 4, 4, 6)",
    ),
    "integer input": (
        lambda d: BCN(6, 3)(x(2, 6, 4, 4, dtype=torch.uint8)),
        TypeError,
        f"{KINDS} torch.uint8; convert it, such as by x.float()",
    ),
    "complex input": (
        lambda d: BCN(6, 3)(x(2, 6, 4, 4, dtype=torch.complex64)),
        TypeError,
        f"{KINDS} torch.complex64",
    ),
    "numpy input": (lambda d: BCN(6, 3)(np.zeros((2, 6))), TypeError, f"{KINDS} ndarray"),
    # layers: settings
    "groups do not divide": (lambda d: BCN(6, 4), ValueError, "num_groups=4 does not", GROUPS),
    "no groups": (lambda d: MicroBCN(6, 0), ValueError, "num_groups=0 does not divide", GROUPS),
    "negative groups": (lambda d: SyncBCN(6, -3), ValueError, "num_groups=-3 does not", GROUPS),
    "default groups": (
        lambda d: BCN(48),
        ValueError,
        "num_groups=32 does not divide the layer's 48 channels",
        "num_groups='auto'",
    ),
    "groups of GroupNorm": (lambda d: AutoGroupNorm(6, 4), ValueError, GROUPS),
    "groups as text": (lambda d: BCN(6, "3"), TypeError, "an int or 'auto', got '3'"),
    "groups as float": (lambda d: BCN(6, 3.0), TypeError, "an int or 'auto', got 3.0"),
    "no features": (lambda d: BCN(0), ValueError, "num_features must be at least 1, got 0"),
    "features as float": (lambda d: BCN(64.0), TypeError, "must be an int, got 64.0"),
    "eps zero": (lambda d: BCN(6, 3, eps=0), ValueError, "greater than 0, got 0:", EPS),
    "eps negative": (lambda d: MicroBCN(6, 3, eps=-1e-5), ValueError, "got -1e-05", EPS),
    "eps NaN": (lambda d: SyncBCN(6, 3, eps=float("nan")), ValueError, "must be finite", EPS),
    "eps as text": (lambda d: BCN(6, 3, eps="1e-5"), TypeError, "a number, got '1e-5'", EPS),
    "eps of GroupNorm": (lambda d: AutoGroupNorm(6, eps=0), ValueError, "got 0", EPS),
    "eps of InstanceNorm": (lambda d: AffineInstanceNorm(6, eps=-1), ValueError, "got -1", EPS),
    "eps of frozen BN": (lambda d: FrozenBN(6, eps=0), ValueError, "got 0", EPS),
    "eps of WSConv2d": (lambda d: WSConv2d(3, 6, 3, eps=-1), ValueError, "at least 0, got -1"),
    "momentum above 1": (lambda d: BCN(6, 3, momentum=1.5), ValueError, MOMENTUM, "got 1.5"),
    "momentum negative": (lambda d: MicroBCN(6, 3, momentum=-0.1), ValueError, MOMENTUM, "-0.1"),
    "momentum as text": (lambda d: SyncBCN(6, 3, momentum="0.1"), TypeError, MOMENTUM, "'0.1'"),
    "misspelt argument": (lambda d: BCN(6, num_group=3), TypeError, "argument 'num_group'"),
    "filters of one weight": (
        lambda d: WSConv2d(8, 8, 1, groups=8),
        ValueError,
        "at least 2 weights, got shape (8, 1, 1, 1)",
        "use nn.Conv2d for this layer",
    ),
    "backend unknown": (
        lambda d: backend(d, "cuda"),
        UsageError,
        "MMBCN_BACKEND is 'cuda'; known: auto, aten, triton, reference",
    ),
    # state dicts
    "half a state dict": (
        lambda d: load(BCN(6, 3), lambda s: s.pop("bn.running_var")),
        RuntimeError,
        'Missing key(s) in state_dict: "bn.running_var"',
    ),
    "state of other groups": (
        lambda d: load(BCN(6, 3), lambda s: s.update(weight=torch.ones(2))),
        RuntimeError,
        "size mismatch for weight: copying a param with shape torch.Size([2])",
        "current model is torch.Size([3])",
    ),
    # switches
    "unknown norm": (
        lambda d: set_norm(dict(norm_cfg=dict(type="BN")), "bcn-ws"),
        UsageError,
        "unknown norm 'bcn-ws'; did you mean 'bcn_ws'? Known: bn, bn_ws, syncbn",
    ),
    "unknown norm to convert to": (
        lambda d: convert_norm(nn.BatchNorm2d(4), "MicroBCN"),
        UsageError,
        "unknown norm 'MicroBCN'; did you mean 'microbcn'?",
    ),
    "config where a module is wanted": (
        lambda d: convert_norm(dict(norm_cfg=dict(type="BN")), "bcn"),
        TypeError,
        "expects a built model, an nn.Module, got <class 'dict'>; for the model of a config use",
    ),
    "module where a config is wanted": (
        lambda d: set_norm(nn.BatchNorm2d(4), "bcn"),
        TypeError,
        "expects the model dict of a config",
        "for a built model use mmbcn.convert_norm",
    ),
    "nothing to convert": (
        lambda d: convert_norm(nn.Linear(3, 3), "bcn"),
        UsageError,
        "found no BatchNorm, GroupNorm or InstanceNorm in Linear",
    ),
    "nothing to switch": (
        lambda d: set_norm(dict(type="X"), "bcn"),
        UsageError,
        "found no norm_cfg to switch",
        "is it the `model` of a config?",
    ),
    # config files and command lines
    "no config": (
        lambda d: d.run("train", "configs/none.py"),
        UsageError,
        "there is no config configs/none.py; configs/README.md lists those shipped",
    ),
    "a folder as config": (lambda d: d.run("train", "configs"), UsageError, "no config configs;"),
    "config of another kind": (
        lambda d: d.run("train", write(d, "config.txt", "model = dict()")),
        UsageError,
        "cannot read the config",
        "config.txt: Only py/yml/yaml/json type are supported",
    ),
    "syntax error in a config": (
        lambda d: d.run("train", write(d, "config.py", "model = dict(\n")),
        UsageError,
        "cannot read the config",
        "config.py",
        "never closed",
    ),
    "base of a config is missing": (
        lambda d: d.run("train", write(d, "config.py", "_base_ = './nowhere.py'\n")),
        UsageError,
        "cannot read the config",
        "nowhere.py",
    ),
    "fragment of a config": (
        lambda d: d.run("train", ROOT / "configs/_base_/default_runtime.py"),
        UsageError,
        "the config has no train_dataloader, train_cfg, optim_wrapper",
        "is it a fragment of a config",
    ),
    "no model to switch": (
        lambda d: d.train("--norm", "bcn", changes={"model": DELETE}),
        UsageError,
        "the config has no model",
    ),
    "no optimizer": (
        lambda d: d.train(changes={"optim_wrapper": DELETE}),
        UsageError,
        "the config has no optim_wrapper",
    ),
    "nothing to test on": (
        lambda d: d.run("test", d.config({"test_dataloader": None}), "x.pth"),
        UsageError,
        "the config has no test_dataloader",
    ),
    "--norm misspelt": (
        lambda d: d.train("--norm", "micro_bcn"),
        UsageError,
        "unknown norm 'micro_bcn'; did you mean 'microbcn'?",
    ),
    "--cfg-options without =": (
        lambda d: d.options("train_cfg.max_iters", "5"),
        SystemExit,
        "--cfg-options takes KEY=VALUE",
        "got 'train_cfg.max_iters'",
    ),
    "--cfg-options with a dict": (
        lambda d: d.options("custom_hooks=[dict(type='EMAHook',momentum=0.1)]"),
        SystemExit,
        "--cfg-options cannot read custom_hooks=[dict(",
        "one by one, KEY.ENTRY=VALUE",
    ),
    "--cfg-options with half a list": (
        lambda d: d.options("model.backbone.strides=[1,2"),
        SystemExit,
        "--cfg-options cannot read model.backbone.strides=[1,2",
    ),
    "--cfg-options into a list": (
        lambda d: d.options("train_dataloader.dataset.pipeline.9.prob=1"),
        UsageError,
        "--cfg-options does not fit the config",
        "9",
    ),
    "--cfg-options below a value": (
        lambda d: d.options("train_cfg.max_iters.x=1"),
        UsageError,
        "--cfg-options does not fit the config",
        "max_iters",
    ),
    "--launcher without torchrun": (
        lambda d: d.train("--launcher", "pytorch"),
        UsageError,
        "tools/dist_train.sh CONFIG NUM_GPUS",
    ),
    "--launcher without srun": (
        lambda d: d.train("--launcher", "slurm"),
        UsageError,
        "--launcher slurm is for processes that torchrun, srun or mpirun starts",
        "tools/slurm_train.sh",
    ),
    "--amp on another wrapper": (
        lambda d: d.train("--amp", changes={"optim_wrapper.type": "ApexOptimWrapper"}),
        UsageError,
        "--amp needs optim_wrapper.type 'OptimWrapper', got 'ApexOptimWrapper'",
    ),
    "--tta without its pipeline": (
        lambda d: d.run("test", d.config({"tta_pipeline": DELETE}), __file__, "--tta"),
        UsageError,
        "--tta needs tta_pipeline and tta_model in the config",
    ),
    "work_dir that cannot be": (
        lambda d: d.train("--work-dir", below_a_file(d)),
        UsageError,
        "cannot write in the work_dir",
        "file/work: Not a directory",
        "--work-dir PATH",
    ),
    "disk that is full for a log": (
        full_disk,
        UsageError,
        "No space left on device. Checkpoints are untouched. Make room",
        "--resume",
    ),
    "no checkpoint": (
        lambda d: d.run("test", d.config(), "none.pth"),
        UsageError,
        "there is no checkpoint none.pth",
    ),
    "checkpoint of another norm": (
        other_norm,
        UsageError,
        "the checkpoint is of another norm than the config",
        "is a batch-channel norm in the model and BatchNorm in the checkpoint",
        "or the same --norm",
    ),
    # what a config says
    "key misspelt": (
        lambda d: d.options("optim_wraper.optimizer.lr=1"),
        UsageError,
        "the config has the key 'optim_wraper', which nothing reads; did you mean 'optim_wrapper'?",
    ),
    "letters of a key swapped": (
        lambda d: d.options("trian_cfg.max_iters=1"),
        UsageError,
        "the config has the key 'trian_cfg', which nothing reads; did you mean 'train_cfg'?",
    ),
    "scope misspelt": (
        lambda d: d.train(changes={"default_scope": "mmsegg"}),
        UsageError,
        "is known, but in another scope: is it default_scope that is misspelt",
    ),
    "half a validation": (
        lambda d: d.train(changes={"val_cfg": dict(type="ValLoop")}),
        UsageError,
        "the config does not fit the runner: val_dataloader, val_cfg, and val_evaluator should be",
    ),
    "norm_cfg with a misspelt key": (
        lambda d: d.options("model.backbone.norm_cfg.num_group=4"),
        UsageError,
        "model.backbone.norm_cfg has the unknown key 'num_group'; did you mean 'num_groups'?",
        "BCN knows: type, requires_grad, num_features, num_groups, eps, momentum",
    ),
    "norm_cfg of BN with a misspelt key": (
        lambda d: d.train(norm="bn", changes={"model.decode_head.norm_cfg.momentun": 0.1}),
        UsageError,
        "model.decode_head.norm_cfg has the unknown key 'momentun'; did you mean 'momentum'?",
    ),
    "norm_cfg of GN without groups": (
        lambda d: d.train(changes={"model.decode_head.norm_cfg": dict(type="GN")}),
        UsageError,
        "model.decode_head.norm_cfg needs num_groups for GroupNorm",
    ),
    "norm_cfg with a misspelt type": (
        lambda d: d.options("model.backbone.norm_cfg.type=mmbcn.BNC"),
        UsageError,
        "the config has type='mmbcn.BNC', but no model is registered under that name",
        "; did you mean 'mmbcn.BCN'?",
    ),
    "norm_cfg with groups that do not divide": (
        lambda d: d.options("model.backbone.norm_cfg.num_groups=32"),
        UsageError,
        "num_groups=32 does not divide the layer's 4 channels",
    ),
    "setting of a model misspelt": (
        lambda d: d.options("model.decode_head.num_class=7"),
        UsageError,
        "unexpected keyword argument 'num_class'; did you mean 'num_classes'?",
    ),
    "depth of no ResNet": (
        lambda d: d.options("model.backbone.depth=19"),
        UsageError,
        "do not fit ResNetV1c: invalid depth 19 for resnet. They are: depth=19, ",
    ),
    "strides of another number": (
        lambda d: d.options("model.backbone.strides=(1,2,1)"),
        UsageError,
        "do not fit ResNetV1c: assert len(strides) == len(dilations) == num_stages",
        "strides=(1, 2, 1)",
    ),
    "channels that the backbone has not": (
        lambda d: d.options("model.decode_head.in_channels=2048"),
        UsageError,
        "ASPPHead has in_index=3 and in_channels=2048, but the backbone's stages 0 to 3 have",
        "8, 16, 32, 64 channels: set both",
    ),
    "stage that the backbone has not": (
        lambda d: d.options("model.auxiliary_head.in_index=4"),
        UsageError,
        "FCNHead has in_index=4 and in_channels=32, but the backbone's stages 0 to 3",
    ),
    "max_iters misspelt": (
        lambda d: d.options("train_cfg.max_iter=5"),
        UsageError,
        "do not fit IterBasedTrainLoop",
        "'max_iter'; did you mean 'max_iters'?",
    ),
    "dataset type misspelt": (
        lambda d: d.options("train_dataloader.dataset.type=mmbcn.ShapeDataset"),
        UsageError,
        "type='mmbcn.ShapeDataset', but no dataset is registered under that name",
        "did you mean 'mmbcn.ShapesDataset'?",
    ),
    "setting of a dataset misspelt": (
        lambda d: d.options("train_dataloader.dataset.img_sufix=.png"),
        UsageError,
        "'img_sufix'; did you mean 'img_suffix'?",
    ),
    "hook misspelt": (
        lambda d: d.train(changes={"custom_hooks": [dict(type="EmaHook")]}),
        UsageError,
        "type='EmaHook', but no hook is registered under that name; did you mean 'EMAHook'?",
    ),
    "hook without a type": (
        lambda d: d.options("default_hooks.chekpoint.interval=2"),
        UsageError,
        "a part of the config cannot be built: ",
        "must contain the key \"type\", but got {'interval': 2}",
    ),
    "setting of the checkpoint hook misspelt": (
        lambda d: d.train(
            changes={"default_hooks.checkpoint": dict(type="CheckpointHook", intervall=2)}
        ),
        UsageError,
        "do not fit SafeCheckpointHook",
        "'intervall'; did you mean 'interval'?",
    ),
    "transform misspelt": (
        lambda d: d.options("train_dataloader.dataset.pipeline.2.type=RandomFlipp"),
        UsageError,
        "type='RandomFlipp', but no transform is registered",
        "did you mean 'RandomFlip'?",
    ),
    "optimizer misspelt": (
        lambda d: d.options("optim_wrapper.optimizer.type=AdamWW"),
        UsageError,
        "type='AdamWW', but no optimizer is registered",
        "did you mean 'AdamW'?",
    ),
    "learning rate below zero": (
        lambda d: d.options("optim_wrapper.optimizer.lr=-1"),
        UsageError,
        "do not fit AdamW: Invalid learning rate: -1. They are: ",
        "lr=-1",
    ),
    "learning rate as text": (
        lambda d: d.options("optim_wrapper.optimizer.lr=1e-3x"),
        UsageError,
        "do not fit AdamW: ",
        "lr='1e-3x'",
    ),
    "setting of a data loader misspelt": (
        lambda d: d.options("train_dataloader.num_worker=2"),
        UsageError,
        "do not fit DataLoader",
        "'num_worker'; did you mean 'num_workers'?",
    ),
    "batch of none": (
        lambda d: d.options("train_dataloader.batch_size=0"),
        UsageError,
        "do not fit DataLoader: batch_size should be a positive integer value, but got batch",
    ),
    "persistent workers without workers": (
        lambda d: d.options("train_dataloader.persistent_workers=True"),
        UsageError,
        "do not fit DataLoader: persistent_workers option needs num_workers > 0",
    ),
    "no images to draw": (
        lambda d: d.options("train_dataloader.dataset.num_images=0"),
        UsageError,
        "num_images must be an integer of 1 or more, got 0",
    ),
    "action of NonFiniteHook": (
        lambda d: d.train(changes={"custom_hooks": [dict(type="mmbcn.NonFiniteHook", action="")]}),
        UsageError,
        "action must be 'stop' or 'skip', got ''",
    ),
    "BatchNorm on one image": (
        lambda d: d.train(norm="bn", batch=1),
        UsageError,
        "Expected more than 1 value per channel when training",
        "use --norm bcn, microbcn or gn, or a larger batch",
    ),
    # data
    "folder missing": (lambda d: d.camvid(lose_folder), UsageError, "images/train (img_path) does"),
    "label missing": (lambda d: d.camvid(lose_label), UsageError, "1 of 8 files are missing: "),
    "no image of the suffix": (
        lambda d: d.camvid(no_images, workers=1),
        UsageError,
        "CamVidDataset found no image: expected files that end in '.jpg' in",
        "Check data_root, data_prefix, img_suffix",
    ),
    "no image of the suffix, not serialized": (  # InfiniteSampler would look for one for ever
        lambda d: d.camvid(no_images, workers=1, serialize_data=False),
        UsageError,
        "CamVidDataset found no image",
    ),
    "image cut short": (
        lambda d: d.camvid(truncate("images", 20)),
        UsageError,
        "cannot read",
        "images/train/",
        ".jpg",
        "Replace the file, or take it out",
    ),
    "image cut short, in a worker": (
        lambda d: d.camvid(truncate("images", 20), workers=1),
        UsageError,
        "error: cannot read",
        "images/train/",
    ),
    "image empty": (lambda d: d.camvid(truncate("images", 0)), UsageError, "cannot read", ".jpg"),
    "label cut short": (
        lambda d: d.camvid(truncate("annotations", 40)),
        UsageError,
        "cannot read",
        "annotations/train/",
        "tools/datasets/check.py CONFIG finds all",
    ),
    "image and label of different sizes": (
        lambda d: d.camvid(wrong_size),
        UsageError,
        "48x40 pixels (height x width), but its image",
        ".jpg has 48x48. They must be of one size",
    ),
    "images of a batch of different sizes": (
        lambda d: d.camvid(other_size),
        UsageError,
        "the images of a batch differ in size",
        "padded to model.data_preprocessor.size",
    ),
    "label outside the classes": (
        lambda d: d.camvid(wrong_label),
        UsageError,
        "has the label values [200], but the model has the classes 0 to 10",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case, tmp_path, tiny_config, monkeypatch, capsys):
    call, error, *parts = CASES[case]
    monkeypatch.chdir(ROOT)
    with pytest.raises(error) as caught:
        call(Door(tmp_path, tiny_config, monkeypatch))
    text = capsys.readouterr().err if error is SystemExit else str(caught.value)
    for part in parts:
        assert part in text
    assert "Traceback" not in text
