"""The tools test.py and checkpoints/convert.py on the authors' DeepLabV3, as a user calls them."""

import argparse
import copy
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmseg")
import cv2
from loading import ROOT, evaluating
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import DATASETS, MODELS

from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.errors import UsageError

CONVERT = "checkpoints/convert"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``python tools/<tool>.py ARGS``; what it printed, or its last words as a UsageError."""

    def call(tool, *args):
        monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", *map(str, args)])
        monkeypatch.syspath_prepend(ROOT / "tools")
        monkeypatch.delitem(sys.modules, "_common", raising=False)
        monkeypatch.setenv("LOCAL_RANK", "0")
        try:
            runpy.run_path(str(ROOT / f"tools/{tool}.py"), run_name="__main__")
        except SystemExit as end:
            raise UsageError(end.code) from end
        return capsys.readouterr().out

    return call


@pytest.fixture
def config(tmp_path):
    """The shipped recipe at depth 50, tested on two images of the embedded set."""
    path = tmp_path / "config.py"
    base = ROOT / "configs/_base_/models/deeplabv3_r101_os16.py"
    images = dict(type="mmbcn.ShapesDataset", num_images=2, size=(64, 64), seed=3)
    steps = [dict(type=t) for t in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
    path.write_text(
        f"_base_ = {str(base)!r}\n"
        "from mmbcn import set_norm\n"
        "model = set_norm(_base_.model, 'syncbcn_ws')\n"
        "model.backbone.depth = 50\n"
        "model.data_preprocessor.size = None\n"
        "model.decode_head.num_classes = 21\n"
        "default_scope = 'mmseg'\n"
        f"test_dataloader = dict(batch_size=1, num_workers=0, dataset={images!r},\n"
        "    sampler=dict(type='DefaultSampler', shuffle=False))\n"
        f"test_dataloader['dataset']['pipeline'] = {steps!r}\n"
        "test_cfg = dict(type='TestLoop')\n"
        "test_evaluator = dict(type='IoUMetric')\n"
    )
    return path


def predicted(net, cfg):
    """The published network's label maps of the config's images, upsampled as its authors do."""
    data = DATASETS.build(cfg.test_dataloader.dataset)
    mean = torch.tensor(cfg.model.data_preprocessor.mean)[:, None, None]
    std = torch.tensor(cfg.model.data_preprocessor.std)[:, None, None]
    for item in data:
        image = item["inputs"].flip(0).float()  # BGR -> RGB
        with torch.no_grad():
            logits = net(((image - mean) / std)[None])
        size = image.shape[1:]
        yield F.interpolate(logits, size, mode="bilinear", align_corners=True)[0].argmax(0)


def test_testing_and_converting(run, config, published, save, tmp_path):
    """The test's label maps are the published network's; converted, it loads in mmengine alone."""
    init_default_scope("mmseg")
    net = published("deeplab_50")
    path = save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}})
    work = ["--work-dir", tmp_path / "work"]
    run("test", config, path, *work, "--out", tmp_path / "maps")
    cfg = Config.fromfile(config)
    files = sorted((tmp_path / "maps").glob("*.png"), key=lambda p: int(p.stem.split("_")[0]))
    maps = list(predicted(net, cfg))
    assert len(files) == len(maps) == 2
    for file, expected in zip(files, maps, strict=True):
        assert expected.unique().numel() > 2
        same = cv2.imread(str(file), cv2.IMREAD_UNCHANGED) == expected.numpy()
        assert np.mean(same) > 0.999  # ties within rounding

    out = run(CONVERT, path, tmp_path / "ours.pth", "--config", config)
    assert "names of the authors' DeepLabV3 -> mmseg's" in out
    assert out.endswith(f"wrote {tmp_path / 'ours.pth'}\n")
    model = MODELS.build(cfg.model)
    checkpoint = load_checkpoint(model, str(tmp_path / "ours.pth"), strict=True)
    assert checkpoint["meta"]["converted_from"] == "checkpoint.pth"
    assert checkpoint["meta"]["dataset_meta"]["classes"]
    x = torch.randn(1, 3, 65, 65).double()
    with torch.no_grad():
        expected = copy.deepcopy(net).double()(x)
        torch.testing.assert_close(evaluating(model)._forward(x), expected, rtol=0, atol=1e-4)


def test_classes_of_the_scope(monkeypatch):
    """Of a dataset under its plain name, as in mm configs; mmsegmentation's own list."""
    from mmseg.datasets import PascalVOCDataset

    monkeypatch.syspath_prepend(ROOT / "tools")
    find = runpy.run_path(str(ROOT / f"tools/{CONVERT}.py"))["dataset_meta"]
    init_default_scope("mmseg")
    data = dict(type="PascalVOCDataset", metainfo=dict(palette=[]))
    for dataset in (data, dict(type="RepeatDataset", dataset=data)):
        meta = find(Config(dict(test_dataloader=dict(dataset=dataset))))
        assert meta == dict(classes=PascalVOCDataset.METAINFO["classes"], palette=[])
    assert find(Config({})) == {}


def test_refusals_and_their_flags(run, config, published, save, tmp_path):
    state = dict(published("deeplab_50").state_dict())
    del state["layer1.0.bn1.pbn.weight"]
    path = save({"state_dict": state, "args": argparse.Namespace()})
    target = tmp_path / "ours.pth"
    args = [CONVERT, path, target, "--config", config]
    with pytest.raises(UsageError, match=r"^error: .*argparse\.Namespace.*--trust-pickle"):
        run(*args)
    with pytest.raises(UsageError, match=r"^error: .*1 norm layer not matched.*--allow-partial"):
        run(*args, "--trust-pickle")
    assert not target.exists()
    run(*args, "--trust-pickle", "--allow-partial")
    assert "backbone.layer1.0.bn1.bn.bias" in read_checkpoint(target)["state_dict"]
    with pytest.raises(UsageError, match="is the checkpoint itself"):
        run(CONVERT, path, path, "--config", config, "--trust-pickle", "--allow-partial")
    with pytest.raises(UsageError, match=r"^error: .*argparse\.Namespace.*--trust-pickle"):
        run("test", config, path, "--work-dir", tmp_path / "work")
    with pytest.raises(UsageError, match=r"^error: .*1 norm layer not matched.*--allow-partial"):
        run("test", config, path, "--work-dir", tmp_path / "work", "--trust-pickle")


def test_convert_to_safetensors(run, config, published, save, tmp_path):
    """The same tensors as in a .pth file, and what the file was made from."""
    pytest.importorskip("safetensors")
    path = save(published("deeplab_50").state_dict())
    files = [tmp_path / "ours.pth", tmp_path / "ours.safetensors"]
    for target in files:
        run(CONVERT, path, target, "--config", config)
    pth, found = (read_checkpoint(target) for target in files)
    assert found["meta"]["converted_from"] == "checkpoint.pth"
    assert found["state_dict"].keys() == pth["state_dict"].keys()
    for key, value in pth["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][key], value, rtol=0, atol=0)
