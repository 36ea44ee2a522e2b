"""The program in docs/deploy.md runs as it stands there."""

import re
import subprocess
import sys
import venv
from pathlib import Path

import cv2
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
PALETTE = [[10, 20, 30], [200, 100, 0]]


@pytest.fixture
def work(tmp_path):
    """The program, a file whose classes are known, and a picture: dark left, bright right."""
    text = (ROOT / "docs/deploy.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (program,) = (block for block in blocks if "import onnxruntime" in block)
    assert program.count("\n") <= 40
    (tmp_path / "segment.py").write_text(program)
    tmp_path.joinpath("bright.onnx").write_bytes(bright_or_dark())
    picture = np.zeros((60, 90, 3), np.uint8)
    picture[:, 30:] = 250
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    return tmp_path


def bright_or_dark():
    """A file with the interface of exported ones: class 1 where red is at least half."""
    helper, kinds = onnx.helper, onnx.TensorProto
    constants = [
        helper.make_tensor("red", kinds.INT64, [1], [2]),
        helper.make_tensor("half", kinds.UINT8, [], [128]),
        helper.make_tensor("last", kinds.INT64, [1], [3]),
        helper.make_tensor("one", kinds.INT64, [1], [1]),
    ]
    nodes = [
        helper.make_node("Gather", ["images", "red"], ["channel"], axis=3),
        helper.make_node("Squeeze", ["channel", "last"], ["values"]),
        helper.make_node("GreaterOrEqual", ["values", "half"], ["bright"]),
        helper.make_node("Cast", ["bright"], ["labels"], to=kinds.UINT8),
        helper.make_node("Unsqueeze", ["bright", "one"], ["channels"]),
        helper.make_node("Cast", ["channels"], ["logits"], to=kinds.FLOAT),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "bright",
        [info("images", kinds.UINT8, ["n", "h", "w", 3])],
        [
            info("labels", kinds.UINT8, ["n", "h", "w"]),
            info("logits", kinds.FLOAT, ["n", 1, "h", "w"]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    meta = dict(classes='["dark", "bright"]', palette=str(PALETTE), height="30", width="45")
    helper.set_model_props(model, meta)
    return model.SerializeToString()


def check(python, folder):
    command = [str(python), "segment.py", "bright.onnx", "picture.png"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [["picture_classes.png:"], ["bright", "66.7", "%"], ["dark", "33.3", "%"]]
    overlay = cv2.imread(str(folder / "picture_classes.png"))
    assert overlay.shape == (60, 90, 3)
    expected = [[15, 10, 5], [125, 175, 225]]  # blue first: (0 + palette) / 2, (250 + palette) / 2
    assert np.abs(overlay[30, [5, 80]].astype(int) - expected).max() <= 1


def test_program_in_the_docs_runs(work):
    check(sys.executable, work)


@pytest.mark.slow
def test_program_takes_exported_files(work, tmp_path, tiny_config):
    pytest.importorskip("mmseg")
    pytest.importorskip("onnxscript")
    from mmengine.registry import MODELS, DefaultScope

    import mmbcn
    from mmbcn.deploy.export import export

    cfg = tiny_config(norm="bn")
    cfg.val_dataloader = cfg.test_dataloader
    cfg.val_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.val_dataloader.dataset.update(num_images=1, size=(32, 32))
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(mmbcn.set_norm(cfg.model, "bn")).eval()
    export(cfg, {}, model, tmp_path / "model.onnx", folded=True)
    command = [sys.executable, "segment.py", "model.onnx", "picture.png"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shares = [float(line.split()[1]) for line in done.stdout.splitlines()[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.slow
def test_program_needs_three_packages_only(work):
    venv.create(work / "env", with_pip=True)
    python = work / "env/bin/python"
    packages = ["numpy", "opencv-python", "onnxruntime", "-c", str(ROOT / "constraints.txt")]
    done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot install packages: {done.stderr[-300:]}")
    check(python, work)
