"""The configs of mmpretrain and mmdetection build, and train, with our norms alone."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ENV = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
NORMS = {
    "mmpretrain/resnet50_bcn_8xb32_in1k.py": ("BCN", 53),
    "mmdet/retinanet_r50_fpn_microbcn_1x_coco.py": ("MicroBCN", 53),
    "mmdet/faster-rcnn_r50_fpn_microbcn_1x_coco.py": ("MicroBCN", 53),
    "mmdet/mask-rcnn_r50_fpn_microbcn_1x_coco.py": ("MicroBCN", 53),
}


def run(*args):
    command = [sys.executable, "-W", "ignore", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)


def need(*packages):
    for package in packages:
        if not find_spec(package):
            pytest.skip(f"needs {package}")


def two_steps(config, norm=""):
    codebase = config.split("/")[0]
    need(codebase)
    if codebase == "mmdet":
        need("pycocotools")
    # mmdet's two stages need it in the place of mmcv's compiled operations, mmpretrain in any case
    if "retinanet" not in config and (codebase == "mmpretrain" or not find_spec("mmcv._ext")):
        need("torchvision")
    done = run(ROOT / "tests/test_models/two_steps.py", ROOT / "configs" / config, norm)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.mark.parametrize("config", NORMS)
def test_config_trains(config):
    found = two_steps(config)
    kind, number = NORMS[config]
    assert found["norms"] == [kind] * number
    assert math.isfinite(found["loss"])
    assert found["reached"] > 0.95
    if "predicted" in found:
        assert [len(scores) > 0 for scores in found["predicted"]] == [True, True]
        assert all(0 <= score <= 1 for scores in found["predicted"] for score in scores)


@pytest.mark.parametrize("config", ["mmpretrain/resnet50_bcn_8xb32_in1k.py"])
def test_config_switches_to_weight_standardization(config):
    found = two_steps(config, "microbcn_ws")
    assert found["norms"] == ["MicroBCN"] * 53
    assert math.isfinite(found["loss"])


def test_mmpretrain_trains_by_its_own_tool(tmp_path):
    """Its config, no file of it edited, and two options; NormRunner switches."""
    need("mmpretrain", "torchvision", "mmseg")
    import mmpretrain

    rng = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path / f"data/class{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (32, 32, 3), np.uint8))
    mim = Path(mmpretrain.__path__[0], ".mim")
    child = tmp_path / "child.py"
    child.write_text(
        f"_base_ = {str(mim / 'configs/resnet/resnet18_8xb32_in1k.py')!r}\n"
        "steps = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]\n"
        "train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False,\n"
        "    dataset=dict(_delete_=True, type='CustomDataset', pipeline=steps,\n"
        f"        data_root={str(tmp_path / 'data')!r}))\n"
        "train_cfg = dict(max_epochs=1)\n"
        "val_dataloader = val_cfg = val_evaluator = None\n"
        "test_dataloader = test_cfg = test_evaluator = None\n"
    )
    options = ("--cfg-options", "runner_type=mmbcn.NormRunner", "norm=bcn")
    done = run(mim / "tools/train.py", child, "--work-dir", tmp_path / "work", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "work/epoch_1.pth").is_file()
    assert "mmbcn.BCN" in (tmp_path / "work/child.py").read_text()


def test_mmdet_trains_and_validates_by_its_own_tool(tmp_path):
    """Its config, no file of it edited; needs mmcv with its compiled operations."""
    need("mmdet", "pycocotools", "mmseg", "mmcv._ext")
    import mmdet

    rng = np.random.default_rng(0)
    images = [dict(id=i, file_name=f"{i}.png", width=64, height=64) for i in range(4)]
    for image in images:
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        cv2.imwrite(str(tmp_path / image["file_name"]), pixels)
    box = dict(category_id=1, bbox=[5, 5, 40, 40], area=1600, iscrowd=0)
    boxes = [dict(box, id=i + 1, image_id=i) for i in range(4)]
    truth = dict(images=images, annotations=boxes, categories=[dict(id=1, name="person")])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    mim = Path(mmdet.__path__[0], ".mim")
    child = tmp_path / "child.py"
    child.write_text(
        f"_base_ = {str(mim / 'configs/retinanet/retinanet_r18_fpn_1x_coco.py')!r}\n"
        "model = dict(backbone=dict(init_cfg=None, norm_eval=False, frozen_stages=-1),\n"
        "    bbox_head=dict(num_classes=1), test_cfg=dict(score_thr=0.0))\n"
        "steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),\n"
        "    dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')]\n"
        f"data = dict(data_root={str(tmp_path)!r}, ann_file='truth.json', pipeline=steps,\n"
        "    data_prefix=dict(img=''), metainfo=dict(classes=('person',)))\n"
        "train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=data)\n"
        "val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=data)\n"
        f"val_evaluator = dict(ann_file={str(tmp_path / 'truth.json')!r})\n"
        "train_cfg = dict(max_epochs=1)\n"
    )
    options = ("--cfg-options", "runner_type=mmbcn.NormRunner", "norm=microbcn")
    done = run(mim / "tools/train.py", child, "--work-dir", tmp_path / "work", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "coco/bbox_mAP" in done.stdout + done.stderr
    assert (tmp_path / "work/epoch_1.pth").is_file()
    assert "mmbcn.MicroBCN" in (tmp_path / "work/child.py").read_text()
