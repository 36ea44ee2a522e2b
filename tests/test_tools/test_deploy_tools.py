"""The export tool, run as a user runs it."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")

ROOT = Path(__file__).parents[2]
CONFIG = "configs/deeplabv3/deeplabv3_r18_bcn_300_shapes-128x128.py"
TINY = [
    *("model.backbone.base_channels=8", "model.backbone.stem_channels=8"),
    *("model.decode_head.in_channels=64", "model.decode_head.channels=16"),
    *("model.auxiliary_head.in_channels=32", "model.auxiliary_head.channels=16"),
    *("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"),
    *("train_dataloader.dataset.num_images=8", "train_dataloader.dataset.size=(48,56)"),
    *("val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False"),
    *("val_dataloader.dataset.num_images=3", "val_dataloader.dataset.size=(48,56)"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of a small model with BCN."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(ROOT / CONFIG)
    values = (option.split("=") for option in TINY if option.startswith("model"))
    cfg.merge_from_dict({key: int(value) for key, value in values})
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


def export(*args):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "tools/deploy/export.py", *map(str, args), "--cfg-options", *TINY]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_exports_verified_and_measured(checkpoint, tmp_path):
    out = tmp_path / "new" / "model.ts"
    options = ["--format", "torchscript", "--fold", "--verify", "--dynamic", "--evaluate"]
    code, text = export(CONFIG, checkpoint, *options, "--out", out)
    assert code == 0, text
    assert "of 29 the batch stage is" in text
    assert "verified on 5 images (1x48x56, 2x37x71)" in text
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.count("|") == 3)
    assert float(rows["torchscript"]) == pytest.approx(float(rows["PyTorch"]), abs=0.02)
    assert [path.name for path in out.parent.iterdir()] == ["model.ts"]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("onnxscript"), reason="needs onnxscript")
def test_int8_beside_the_file(checkpoint):
    options = ["--fold", "--int8", "--calibration-images", 4, "--evaluate", "--benchmark"]
    code, text = export(CONFIG, checkpoint, *options, "--opset", 22)
    assert code == 0, text
    assert "opset 22" in text
    out = checkpoint.with_suffix(".onnx")
    small = out.with_name("model_int8.onnx")
    assert small.stat().st_size < out.stat().st_size
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if "|" in line]
    assert names.count("onnx, int8") == names.count("onnx") == names.count("PyTorch") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["configs/none.py"], "error: there is no config"),
        ([CONFIG, "--format", "torchscript", "--int8"], "--int8 is for --format onnx"),
        ([CONFIG, "--norm", "gn"], "error: "),
        ([CONFIG, "--opset", "99"], "writes no opset 99"),
        ([CONFIG, "--int8", "--calibration-images", "0"], "--calibration-images must be 1 or more"),
        ([CONFIG, "--input-size", "0", "-5"], "of 1 pixels or more in height and width"),
        ([CONFIG, "--dynamic", "--input-size", "64", "16"], "of 32 pixels or more"),
    ],
)
def test_mistakes_end_in_one_message_and_no_file(checkpoint, tmp_path, args, message):
    config, *options = args
    code, text = export(config, checkpoint, *options, "--out", tmp_path / "model.onnx")
    assert code
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())
