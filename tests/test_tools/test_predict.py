"""tools/predict.py, run as a user runs it, and mmseg's inferencer with the same files."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.registry import MODELS, init_default_scope

from mmbcn import set_norm
from mmbcn.datasets.shapes_scene import CLASSES, PALETTE, draw_scene
from mmbcn.inference.predictor import Predictor
from mmbcn.inference.results import Results

TOOL = Path(__file__).parents[2] / "tools/predict.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory, _shipped):
    """A config, a checkpoint, and images in two folders."""
    root = tmp_path_factory.mktemp("predict")
    cfg = _shipped.copy()
    small = dict(backbone=dict(stem_channels=8, base_channels=8))
    small |= dict(decode_head=dict(in_channels=64, channels=16))
    small |= dict(auxiliary_head=dict(in_channels=32, channels=16))
    cfg.merge_from_dict(dict(model=small))
    cfg.dump(str(root / "config.py"))
    init_default_scope("mmseg")
    torch.manual_seed(1)
    model = MODELS.build(cfg.model)
    for value in model.parameters():
        value.data += 0.2 * torch.randn_like(value)
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=CLASSES, palette=PALETTE))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), root / "iter_1.pth")
    for i, (name, size) in enumerate({"a/1": (40, 56), "a/2": (48, 48), "b/1": (40, 56)}.items()):
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / f"in/{name}.png"), draw_scene(5, i, *size)[0])
    return root


@pytest.fixture
def predict(monkeypatch, capsys, made):
    """Runs the tool in this process; gives its exit code and what it printed."""

    def run(*args, config=made / "config.py", checkpoint=made / "iter_1.pth"):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, (config, checkpoint, *args))])
        monkeypatch.setattr(sys, "path", [str(TOOL.parent), *sys.path])
        monkeypatch.delitem(sys.modules, "_common", raising=False)
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
            code, text = 0, ""
        except SystemExit as error:
            code, text = (error.code, "") if isinstance(error.code, int) else (1, str(error.code))
        printed = capsys.readouterr()
        return code, printed.out + printed.err + text

    return run


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder(predict, made, tmp_path):
    out = tmp_path / "out"
    options = ("--out", out, "--labels", "--probabilities", "--batch-size", 3, "--opacity", 0.25)
    code, text = predict(made / "in", *options)
    assert code == 0, text
    assert "3 of 3 files predicted" in text
    kinds = {"labels": "png", "overlays": "png", "probabilities": "npz"}
    expected = [f"{k}/{n}.{kinds[k]}" for k in kinds for n in ("a/1", "a/2", "b/1")]
    assert files(out) == sorted([*expected, "legend.png", "predictions.json"])
    for name in ("a/1", "a/2", "b/1"):
        image = cv2.imread(str(made / f"in/{name}.png"))
        labels = cv2.imread(str(out / f"labels/{name}.png"), cv2.IMREAD_UNCHANGED)
        with np.load(out / f"probabilities/{name}.npz") as stored:
            probabilities = stored["probabilities"]
        assert (labels.dtype, labels.shape) == (np.uint8, image.shape[:2])
        assert (probabilities.dtype, probabilities.shape) == (np.float16, (7, *image.shape[:2]))
        chosen = np.take_along_axis(probabilities, labels[None].astype(int), 0)[0]
        assert (chosen >= probabilities.max(0) - 1e-3).all()
        np.testing.assert_allclose(probabilities.astype(float).sum(0), 1, atol=5e-3)
        overlay = cv2.imread(str(out / f"overlays/{name}.png"))
        colors = np.asarray(PALETTE)[labels][..., ::-1]
        assert np.abs(overlay - (0.75 * image + 0.25 * colors)).max() <= 1


def test_resumes_and_refuses_other_settings(predict, made, tmp_path):
    out = tmp_path / "out"
    code, text = predict(made / "in/a", "--out", out)
    assert code == 0, text
    first = (out / "overlays/1.png").stat().st_mtime_ns
    (out / "overlays/2.png").unlink()
    code, text = predict(made / "in/a", made / "in/b/1.png", "--out", out)
    assert code == 0, text
    assert "2 of 3 files predicted, 1 were there already" in text
    assert (out / "overlays/1.png").stat().st_mtime_ns == first
    assert (out / "overlays/b/1.png").is_file()
    names = json.loads((out / "predictions.json").read_text())["names"]
    assert names == {
        n: str(made / f"in/{p}.png") for n, p in (("1", "a/1"), ("2", "a/2"), ("b/1", "b/1"))
    }
    code, text = predict(made / "in/a", "--out", out, "--labels")
    assert "2 of 2 files predicted" in text  # not all files were there
    code, text = predict(made / "in/a", "--out", out, "--tta")
    assert code == 1
    assert "made with other settings (tta False there, True now; tta_pipeline None there, " in text
    code, text = predict(made / "in/a", "--out", out, "--tta", "--overwrite")
    assert code == 0, text
    assert "2 of 2 files predicted" in text
    assert (out / "overlays/1.png").stat().st_mtime_ns > first


def test_overwriting_that_broke_off_leaves_nothing_old(predict, made, tmp_path, monkeypatch):
    other = tmp_path / "other.pth"
    checkpoint = torch.load(made / "iter_1.pth", weights_only=True)
    checkpoint["state_dict"] = {k: 2 * v for k, v in checkpoint["state_dict"].items()}
    torch.save(checkpoint, other)
    out = tmp_path / "out"
    code, text = predict(made / "in", "--out", out)
    assert code == 0, text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("overlays/**/*.png")}
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "__call__", interrupt)
        code, text = predict(made / "in", "--out", out, "--overwrite", checkpoint=other)
        assert code
    code, text = predict(made / "in/a", "--out", out, checkpoint=other)
    assert "2 of 2 files predicted: " in text
    code, text = predict(made / "in", "--out", out, checkpoint=other)
    assert "1 of 3 files predicted, 2 were there already" in text
    assert len(before) == 3
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def interrupt(*_):
    raise KeyboardInterrupt


def test_tta_pipeline_is_one_of_the_settings(predict, made, tmp_path):
    options = ("--out", tmp_path / "out", "--tta")
    code, text = predict(made / "in/a", *options)
    assert code == 0, text
    fewer = ("--cfg-options", "tta_pipeline.1.transforms.0.0.scale_factor=1.25")
    code, text = predict(made / "in/a", *options, *fewer)
    assert code == 1
    assert "made with other settings (tta_pipeline " in text


def test_bad_files_are_named_and_counted(predict, made, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    image = (made / "in/a/1.png").read_bytes()
    for name, content in {
        "cut.png": image[:900],
        "empty.jpg": b"",
        "good.png": image,
        "no.mp4": b"0" * 99,
        "text.jpg": b"hello",
    }.items():
        (folder / name).write_bytes(content)
    code, text = predict(folder, "--out", out, "--batch-size", 2)
    assert code == 1
    assert "1 of 5 files predicted" in text
    assert "4 of 5 files were skipped" in text
    for name in ("cut.png", "empty.jpg", "no.mp4", "text.jpg"):
        assert f"  {folder / name}: " in text
    assert files(out) == ["legend.png", "overlays/good.png", "predictions.json"]


def test_video(predict, made, tmp_path, monkeypatch):
    frames = [draw_scene(6, i, 48, 64)[0] for i in range(5)]
    code = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "ride.avi"), code, 12, (64, 48))
    for frame in frames:
        writer.write(frame)
    writer.release()
    out = tmp_path / "out"
    options = ("--out", out, "--labels", "--batch-size", 2, "--opacity", 1)
    code, text = predict(tmp_path / "ride.avi", *options)
    assert code == 0, text
    labels = [f"labels/ride.avi/{i:06d}.png" for i in range(5)]
    assert files(out) == [*labels, "legend.png", "overlays/ride.avi.mp4", "predictions.json"]
    video = cv2.VideoCapture(str(out / "overlays/ride.avi.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 12
    for name in labels:
        there, frame = video.read()
        assert there
        colors = np.asarray(PALETTE)[cv2.imread(str(out / name), 0)][..., ::-1]
        assert np.abs(frame - colors).mean() < 25  # lossy
    assert not video.read()[0]
    code, text = predict(tmp_path / "ride.avi", *options)
    assert "0 of 1 files predicted, 1 were there already" in text

    more, write = (*options, "--probabilities"), Results.write
    monkeypatch.setattr(
        Results, "write", lambda *a: interrupt() if a[-1] == 3 else write(*a)
    )  # in the fourth frame
    code, text = predict(tmp_path / "ride.avi", *more)
    assert code
    monkeypatch.setattr(Results, "write", write)
    code, text = predict(tmp_path / "ride.avi", *more)
    assert "1 of 1 files predicted: " in text
    assert len(files(out / "probabilities/ride.avi")) == 5


@pytest.mark.parametrize(("suffix", "code"), [("mkv", 0), ("avi", 1)])
def test_video_of_fewer_frames_than_it_announces(predict, tmp_path, monkeypatch, suffix, code):
    """AVI counts its frames and is damaged; Matroska tells how long it is, its sound too."""
    path, out = tmp_path / f"ride.{suffix}", tmp_path / "out"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12, (64, 48))
    for i in range(3):
        writer.write(draw_scene(6, i, 48, 64)[0])
    writer.release()
    monkeypatch.setattr("mmbcn.inference.video.count_frames", lambda path: 5)
    found, text = predict(path, "--out", out)
    assert found == code
    assert ("ends after 3 of 5 frames" in text) == (code == 1)
    assert (out / f"overlays/ride.{suffix}.mp4").is_file() == (code == 0)


def test_windows(predict, made, tmp_path):
    """A window as large as the image is the image; smaller ones see less."""
    seen = {}
    for name, options in {
        "whole": (),
        "large": ("--mode", "slide", "--crop-size", 64, 64),
        "small": ("--crop-size", 24, 24, "--stride", 16, 16),
    }.items():
        code, text = predict(made / "in/a", "--out", tmp_path / name, "--probabilities", *options)
        assert code == 0, text
        seen[name] = np.load(tmp_path / name / "probabilities/1.npz")["probabilities"]
    np.testing.assert_allclose(seen["large"], seen["whole"], atol=2e-3)
    assert np.abs(seen["small"] - seen["whole"]).max() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.png"], "there is no file or folder nowhere.png"),
        (["in/a", "--norm", "gn"], "the checkpoint is of another norm than the config"),
        (["in/a", "--opacity", "2"], "--opacity must be from 0 to 1"),
        (["in/a", "--mode", "whole", "--stride", "4", "4"], "are of --mode slide"),
        (["in/a", "--crop-size", "8", "8", "--stride", "9", "8"], "windows leave no gap"),
        (["in/a", "--device", "cuda:77"], "--device cuda:77"),
        (["in/a", "--batch-size", "0"], "--batch-size must be 1 or more"),
        (["in/a", "--cfg-options", "model.backbone.base_channels=4"], "does not fit the model"),
    ],
)
def test_mistakes_write_nothing(predict, made, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(made)
    code, text = predict(*options, "--out", tmp_path / "out")
    assert code == 1
    assert message in text
    assert "--allow-partial" not in text  # which the tool has not
    assert not (tmp_path / "out").exists()


def test_results_cannot_be_a_file(predict, made):
    code, text = predict(made / "in/a", "--out", made / "config.py")
    assert code == 1
    assert text.strip().endswith("config.py is a file")


def test_mmseg_inferencer_sees_the_same(predict, made, tmp_path):
    """The Python API: mmseg's own, given our config and checkpoint."""
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    code, text = predict(made / "in", "--out", tmp_path / "out", "--labels")
    assert code == 0, text
    names = ["a/1", "a/2", "b/1"]
    expected = [cv2.imread(str(tmp_path / f"out/labels/{n}.png"), 0) for n in names]
    paths = [str(made / f"in/{name}.png") for name in names]
    config, weights = str(made / "config.py"), str(made / "iter_1.pth")
    inferencer = MMSegInferencer(config, weights, device="cpu", show_progress=False)
    assert tuple(inferencer.model.dataset_meta["classes"]) == CLASSES
    np.testing.assert_array_equal(inferencer(paths[0])["predictions"], expected[0])
    np.testing.assert_array_equal(inferencer(cv2.imread(paths[1]))["predictions"], expected[1])
    for one, two in zip(inferencer(paths)["predictions"], expected, strict=True):
        np.testing.assert_array_equal(one, two)
    found = inferencer(str(made / "in/b"), out_dir=str(tmp_path / "theirs"))["predictions"]
    np.testing.assert_array_equal(found, expected[2])
    assert files(tmp_path / "theirs") == ["pred/00000005_pred.png", "vis/1.png"]

    model = init_model(config, weights, device="cpu")
    [sample, _] = inference_model(model, [paths[0], paths[2]])
    np.testing.assert_array_equal(sample.pred_sem_seg.data[0].numpy(), expected[0])


def test_mmseg_inferencer_with_a_switched_config(made):
    from mmengine.config import Config
    from mmseg.apis import MMSegInferencer

    cfg = Config.fromfile(made / "config.py")
    set_norm(cfg.model, "microbcn")  # which tests as BCN does
    weights, image = str(made / "iter_1.pth"), str(made / "in/a/1.png")
    seen = [
        MMSegInferencer(c, weights, device="cpu", show_progress=False)(image)["predictions"]
        for c in (str(made / "config.py"), cfg)
    ]
    np.testing.assert_array_equal(*seen)
