"""The lists and the pictures of the dataset doctor."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from doctor_case import PIPELINE, config, diagnose, plant_faults
from mmseg.datasets import PascalVOCDataset

from mmbcn.datasets import write_shapes
from mmbcn.datasets.doctor import open_parts, write_fix_lists, write_pictures
from mmbcn.errors import UsageError

# Fix lists


def test_fix_list_is_read_by_the_config_and_has_no_error(camvid):
    plant_faults(camvid)
    diagnoses = diagnose(config(camvid))
    paths = write_fix_lists(diagnoses, camvid / "lists/good.txt")
    assert paths == {s: camvid / f"lists/good_{s}.txt" for s in ("train", "val")}
    train, val = diagnoses
    fixed, _ = diagnose(config(camvid, ann_file=str(paths["train"])))
    images = [info["img_path"] for i, info in enumerate(train.part.samples) if i not in train.bad]
    assert 5 < len(images) < 20
    assert [info["img_path"] for info in fixed.part.samples] == images
    assert not fixed.bad
    assert len(val.part.samples) == 4


def test_fix_list_of_a_listed_set_and_of_one_with_folders(tmp_path):
    write_shapes(tmp_path / "voc", "voc", 3, 2, size=(32, 40))
    voc = dict(
        type=PascalVOCDataset,
        data_root=str(tmp_path / "voc"),
        ann_file="ImageSets/Segmentation/val.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    )
    diagnoses = diagnose(dict(val_dataloader=dict(dataset=voc)), "val")
    assert write_fix_lists(diagnoses, tmp_path / "a.txt") == dict(val=tmp_path / "a.txt")
    listed = (tmp_path / "voc/ImageSets/Segmentation/val.txt").read_text()
    assert (tmp_path / "a.txt").read_text() == listed

    write_shapes(tmp_path / "cs", "cityscapes", 3, 2, size=(32, 40))
    city = dict(
        type="CityscapesDataset",
        data_root=str(tmp_path / "cs"),
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
    )
    diagnoses = diagnose(dict(val_dataloader=dict(dataset=city)), "val")
    write_fix_lists(diagnoses, tmp_path / "b.txt")
    lines = (tmp_path / "b.txt").read_text().split()
    assert lines == [f"shapes/shapes_{i:06d}_000001" for i in range(2)]
    again = dict(city, ann_file=str(tmp_path / "b.txt"))
    (part,) = open_parts(dict(val_dataloader=dict(dataset=again)), ("val",))
    assert part.paths() == diagnoses[0].part.paths()


def test_fix_list_without_a_good_sample_is_not_written(camvid):
    for path in (camvid / "images/val").iterdir():
        path.write_bytes(b"")
    diagnoses = diagnose(config(camvid), "val")
    with pytest.raises(UsageError, match="val has no sample without an error"):
        write_fix_lists(diagnoses, camvid / "good.txt")
    assert not (camvid / "good.txt").exists()


def test_fix_list_of_a_set_without_files_is_refused():
    loader = dict(dataset=dict(type="mmbcn.ShapesDataset", num_images=2, pipeline=PIPELINE))
    diagnoses = diagnose(dict(train_dataloader=loader), "train")
    with pytest.raises(UsageError, match=r"ShapesDataset .* reads no list of files"):
        write_fix_lists(diagnoses, Path("list.txt"))


# Pictures


def test_pictures_show_labels_in_their_colors(camvid, tmp_path):
    plant_faults(camvid)
    set_labels_to = camvid / "annotations/val"
    for path in set_labels_to.iterdir():
        Image.fromarray(np.full((48, 64), 3, np.uint8)).save(path)
    for path in (camvid / "images/val").iterdir():
        Image.fromarray(np.full((48, 64, 3), 200, np.uint8)).save(path, quality=100)
    train, val = diagnose(config(camvid))
    assert [p.name for p in write_pictures(train, tmp_path / "show")] == [
        "train_overlays.png",
        "train_classes.png",
    ]
    sheet, _ = write_pictures(val, tmp_path / "show")
    pixels = np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 3).astype(int)
    half = np.array([200 + 128, 200 + 64, 200 + 128]) / 2  # the image and the road's colour
    assert (abs(pixels - half).max(1) <= 2).mean() > 0.4
