from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmengine.registry import DATASETS, DefaultScope

from mmbcn.datasets import CamVidDataset

REPO = Path(__file__).parents[2]
ROOTS = [
    root for root in (REPO / "data/camvid", REPO.parent / "shared/data/camvid") if root.is_dir()
]
CLASSES = ["sky", "building", "pole", "road", "pavement", "tree"]
CLASSES += ["signsymbol", "fence", "car", "pedestrian", "bicyclist"]
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]


def build(root, split, pipeline=()):
    with DefaultScope.overwrite_default_scope("mmseg"):
        return DATASETS.build(
            dict(
                type="mmbcn.CamVidDataset",
                data_root=str(root),
                data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
                pipeline=list(pipeline),
            )
        )


def test_metainfo_has_eleven_classes_in_order():
    assert list(CamVidDataset.METAINFO["classes"]) == CLASSES
    palette = CamVidDataset.METAINFO["palette"]
    assert len({tuple(color) for color in palette}) == 11
    assert palette[CLASSES.index("road")] == [128, 64, 128]
    assert palette[CLASSES.index("car")] == [64, 0, 128]


def test_camvid_pairs_images_with_labels_and_ignores_255(tmp_path):
    rng = np.random.default_rng(0)
    expected = {}
    for name in ("b_1", "a_2", "c_0"):
        for folder in ("images", "annotations"):
            (tmp_path / folder / "train").mkdir(parents=True, exist_ok=True)
        label = rng.choice([*range(11), 255], (20, 31)).astype(np.uint8)
        expected[f"{name}.jpg"] = label
        image = np.zeros((20, 31, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"images/train/{name}.jpg"), image)
        cv2.imwrite(str(tmp_path / f"annotations/train/{name}.png"), label)
    dataset = build(tmp_path, "train", PIPELINE)
    assert dataset.ignore_index == 255
    assert len(dataset) == 3
    for sample in dataset:
        data = sample["data_samples"]
        label = data.gt_sem_seg.data[0].numpy()
        np.testing.assert_array_equal(label, expected[Path(data.img_path).name])


@pytest.mark.skipif(not ROOTS, reason="needs data/camvid")
@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_camvid_real_data_has_its_counts_and_all_classes(split, count):
    dataset = build(ROOTS[0], split, PIPELINE)
    assert len(dataset) == count
    values = set()
    for index in range(0, count, 10):
        sample = dataset[index]
        label = sample["data_samples"].gt_sem_seg.data
        assert tuple(sample["inputs"].shape) == (3, 360, 480)
        assert tuple(label.shape) == (1, 360, 480)
        values |= set(label.unique().tolist())
    assert values - {255} == set(range(11))
