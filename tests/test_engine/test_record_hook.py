"""What `RecordHook` writes of a test, against pixels counted by hand."""

import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from mmbcn.engine import RecordHook

COLORS = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
TRUTH = [[0, 0, 1, 1], [0, 1, 1, 255], [2, 2, 255, 255]]
PREDICTION = [[0, 1, 1, 1], [0, 1, 0, 0], [2, 1, 2, 1]]
# agree: 0 twice, 1 three times, 2 once; ignored: 255, whatever is predicted there
INTERSECTION, UNION = [2, 3, 1], [4, 6, 2]


class Images(list):
    metainfo: ClassVar = dict(classes=("a", "b", "c"), palette=COLORS)


def sample(path, truth=TRUTH, prediction=PREDICTION):
    found = SegDataSample(metainfo=dict(img_path=str(path)))
    found.gt_sem_seg = PixelData(data=torch.tensor(truth)[None])
    found.pred_sem_seg = PixelData(data=torch.tensor(prediction)[None])
    return found


def record(folder, samples, num_images, batch=2):
    dataset = Images(range(len(samples)))
    runner = SimpleNamespace(work_dir=folder, test_dataloader=SimpleNamespace(dataset=dataset))
    hook = RecordHook(num_images)
    hook.before_test_epoch(runner)
    for start in range(0, len(samples), batch):
        hook.after_test_iter(runner, 0, None, samples[start : start + batch])
    hook.after_test_epoch(runner, dict(mIoU=np.float32(50)))
    return json.loads((folder / "record/test.json").read_text())


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "some.image.png"
    Image.new("RGB", (4, 3), (200, 100, 50)).save(path)
    return path


def test_pixels_are_counted(tmp_path, image):
    content = record(tmp_path, [sample(image)] * 3, 0)
    assert content["intersection"] == [3 * n for n in INTERSECTION]
    assert content["union"] == [3 * n for n in UNION]
    assert content["classes"] == ["a", "b", "c"]
    assert content["images"] == 3
    assert content["metrics"] == dict(mIoU=50.0)
    assert not list((tmp_path / "record").glob("*.png"))


def test_pictures_have_the_colours_of_the_set(tmp_path, image):
    record(tmp_path, [sample(image)] * 5, 2)
    names = {path.name for path in (tmp_path / "record").iterdir()} - {"test.json"}
    assert names == {
        f"{number}_some.image_{kind}"
        for number in ("0002", "0004")
        for kind in ("image.jpg", "truth.png", "prediction.png")
    }
    colors = np.array([*COLORS, [255, 255, 255]])
    for kind, labels in (("truth", TRUTH), ("prediction", PREDICTION)):
        with Image.open(tmp_path / f"record/0002_some.image_{kind}.png") as picture:
            seen = np.asarray(picture.convert("RGB"))
        assert (seen == colors[np.minimum(labels, 3)]).all()
    with Image.open(tmp_path / "record/0002_some.image_image.jpg") as picture:
        assert np.abs(np.asarray(picture) - np.array([200, 100, 50.0])).max() < 8


def test_large_pictures_are_made_small(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (960, 100)).save(path)
    labels = np.arange(960 * 100).reshape(100, 960) % 3
    record(tmp_path, [sample(path, labels.tolist(), labels.tolist())], 1)
    for name in ("image.jpg", "truth.png", "prediction.png"):
        with Image.open(tmp_path / f"record/0000_large_{name}") as picture:
            assert picture.size == (480, 50)


def test_a_second_test_begins_anew(tmp_path, image):
    dataset = Images([0])
    runner = SimpleNamespace(work_dir=tmp_path, test_dataloader=SimpleNamespace(dataset=dataset))
    hook = RecordHook(0)
    for _ in range(2):
        hook.before_test_epoch(runner)
        hook.after_test_iter(runner, 0, None, [sample(image)])
        hook.after_test_epoch(runner, {})
    assert json.loads((tmp_path / "record/test.json").read_text())["union"] == UNION
