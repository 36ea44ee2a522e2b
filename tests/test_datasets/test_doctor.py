"""The dataset doctor, on scenes and, where it is there, on real data."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmengine.config import ConfigDict
from mmseg.datasets import PascalVOCDataset

from mmbcn.datasets import CamVidDataset, write_shapes
from mmbcn.datasets.doctor import (
    examine,
    format_report,
    open_parts,
    write_fix_lists,
    write_pictures,
)
from mmbcn.datasets.doctor.causes import guess_cause
from mmbcn.datasets.doctor.examine import image_moments
from mmbcn.errors import UsageError

REPO = Path(__file__).parents[2]
ROOTS = [
    root for root in (REPO / "data/camvid", REPO.parent / "shared/data/camvid") if root.is_dir()
]
PIPELINE = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
MODEL = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)


def dataset(root, split, **settings):
    prefix = dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}")
    settings = {"data_prefix": prefix, "pipeline": PIPELINE, **settings}
    return dict(type="mmbcn.CamVidDataset", data_root=str(root), **settings)


def config(root, model=MODEL, splits=("train", "val"), **settings):
    loaders = {f"{s}_dataloader": dict(dataset=dataset(root, s, **settings)) for s in splits}
    return ConfigDict(model=model, **loaders)


def diagnose(cfg, *splits):
    return examine(open_parts(cfg, splits or ("train", "val")), 1)


def found(diagnoses):
    """(kind, file name) of all findings."""
    findings = [finding for diagnosis in diagnoses for finding in diagnosis.findings]
    return [(finding.kind, Path(finding.path).name) for finding in findings]


def text_of(diagnoses, kind):
    (text,) = (str(f) for d in diagnoses for f in d.findings if f.kind == kind)
    return text


@pytest.fixture
def camvid(tmp_path):
    """24 training and 4 validation scenes, in 7 of the 11 classes."""
    write_shapes(tmp_path / "camvid", "camvid", 24, 4, size=(48, 64))
    return tmp_path / "camvid"


@pytest.fixture
def real(tmp_path):
    """24 training and 4 validation images of CamVid."""
    if not ROOTS:
        pytest.skip("needs data/camvid")
    for split, count in dict(train=24, val=4).items():
        images = sorted((ROOTS[0] / "images" / split).iterdir())
        for image in images[:: len(images) // count][:count]:
            label = ROOTS[0] / "annotations" / split / f"{image.stem}.png"
            for path in (image, label):
                target = tmp_path / path.relative_to(ROOTS[0])
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    return tmp_path


def plant_faults(root):
    """Break one training sample after the other; the findings (kind, file name) to expect."""
    images = sorted((root / "images/train").iterdir())
    labels = [root / f"annotations/train/{image.stem}.png" for image in images]
    expected = set()

    def expect(kind, path):
        expected.add((kind, path.name))
        return path

    def change(path, function):
        Image.fromarray(function(np.asarray(Image.open(path)))).save(path)

    expect("missing label", labels[0]).unlink()
    images[1].unlink()
    expect("label without image", labels[1])
    data = images[2].read_bytes()
    expect("unreadable image", images[2]).write_bytes(data[: len(data) // 2])
    data = labels[3].read_bytes()
    expect("unreadable label", labels[3]).write_bytes(data[: len(data) // 2])
    expect("unreadable image", images[4]).write_bytes(b"")
    expect("unreadable image", images[5]).write_text("404 not found")
    change(expect("image and label differ in size", labels[6]), lambda x: x[:-1])
    change(expect("label has more than 8 bits", labels[7]), lambda x: x + np.uint16(24000))
    palette = np.zeros((256, 3), np.uint8)
    palette[:11] = CamVidDataset.METAINFO["palette"]
    change(expect("label is not one channel", labels[8]), lambda x: palette[x])
    change(
        expect("label values outside the classes", labels[9]),
        lambda x: np.where(x < 11, x + 7, 0).astype(np.uint8),
    )
    change(
        expect("label values outside the classes", labels[10]),
        lambda x: np.where(x > 2, 11, x).astype(np.uint8),  # void of SegNet's release
    )
    change(expect("suspicious label", labels[11]), lambda x: 255 * (x > 3).astype(np.uint8))
    change(expect("label stored as 16 bits or more", labels[12]), lambda x: x.astype(np.uint16))
    val = min((root / "images/val").iterdir())
    shutil.copyfile(val, expect("same image in two splits", images[13]))
    shutil.copyfile(images[15], expect("same image twice", images[16]))
    Image.open(labels[17]).save(expect("label stored with loss", labels[17]), "JPEG", quality=100)
    change(expect("suspicious label", labels[18]), lambda x: np.full_like(x, 255))
    change(expect("uniform image", images[19]), lambda x: np.zeros_like(x))
    return expected


def check_planted(root, diagnoses, expected):
    assert expected <= set(found(diagnoses))
    # The label that became a JPEG may have values that are no classes; nothing else is wrong.
    jpeg = next(name for kind, name in expected if kind == "label stored with loss")
    extra = {(kind, name) for kind, name in found(diagnoses) if name} - expected
    assert extra <= {("label values outside the classes", jpeg)}
    report = format_report(diagnoses)
    for _, name in expected:
        assert name in report


def test_sound_data_has_no_error(camvid):
    diagnoses = diagnose(config(camvid))
    assert found(diagnoses) == [("classes that never occur", "")] * 2
    assert "4 of 11: fence, car, pedestrian, bicyclist" in format_report(diagnoses)
    assert format_report(diagnoses).endswith("\n0 errors, 2 warnings")


def test_every_planted_fault_is_named(camvid):
    expected = plant_faults(camvid)
    check_planted(camvid, diagnose(config(camvid)), expected)


def test_every_planted_fault_in_real_data_is_named(real):
    assert found(diagnose(config(real))) == []
    expected = plant_faults(real)
    check_planted(real, diagnose(config(real)), expected)


def test_counts_and_moments_are_those_of_all_pixels(camvid):
    images = [cv2.imread(str(p)) for p in sorted((camvid / "images/train").iterdir())]
    labels = [cv2.imread(str(p), -1) for p in sorted((camvid / "annotations/train").iterdir())]
    diagnosis, _ = diagnose(config(camvid))
    pixels = np.stack(images)[..., ::-1].reshape(-1, 3)  # R, G, B: the preprocessor turns them
    mean, std = image_moments(diagnosis)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9)
    counts = [(np.stack(labels) == value).sum() for value in range(256)]
    np.testing.assert_array_equal(diagnosis.counts, counts)
    shown = [sum((label == value).any() for label in labels) for value in range(256)]
    np.testing.assert_array_equal(diagnosis.images, shown)
    assert diagnosis.sizes == {(48, 64): 24}


def test_several_processes_find_the_same(camvid):
    plant_faults(camvid)
    parts = open_parts(config(camvid), ("train", "val"))
    assert format_report(examine(parts, 2)) == format_report(examine(parts, 1))


@pytest.mark.parametrize(
    ("values", "settings", "cause"),
    [
        ({0, 255}, dict(num_classes=2, ignore_index=254), "0/255 mask"),
        ({0, 1, 255}, dict(num_classes=2, ignore_index=254), "this config ignores 254"),
        ({0, 7, 26, 33}, dict(num_classes=19), "labelTrainIds are wanted"),
        ({7, 11, 21}, dict(num_classes=11), "Cityscapes' labelIds"),
        ({1, 2, 3}, dict(num_classes=3), "reduce_zero_label=True in the dataset$"),
        ({0, 1, 3, 255}, dict(num_classes=3), "or 3 does"),
        ({0, 38, 75, 113}, dict(num_classes=11), "colour mask turned to grey"),
        (set(range(0, 256, 2)), dict(num_classes=11), "interpolated or compressed"),
        ({0, 4, 9}, dict(num_classes=3, reduce_zero_label=True), "another dataset"),
    ],
)
def test_cause_is_guessed(values, settings, cause):
    assert re.search(cause, guess_cause(values, **settings))


def set_labels(root, value):
    for path in (root / "annotations").rglob("*.png"):
        label = value(np.asarray(Image.open(path)))
        Image.fromarray(label.astype(np.uint8)).save(path)


def test_reduce_zero_label_is_applied_as_the_config_does(camvid):
    set_labels(camvid, lambda x: x + 1)
    diagnoses = diagnose(config(camvid, reduce_zero_label=True))
    assert {kind for kind, _ in found(diagnoses)} == {"classes that never occur"}
    assert diagnoses[0].counts[7:].sum() == 0  # classes 0 to 6, not 1 to 7
    set_labels(camvid, lambda x: np.where(x == 1, 12, x))
    text = str(diagnose(config(camvid, reduce_zero_label=True))[0].findings[0])
    assert "11 in " in text
    assert re.search(r"\(in the file: [2-9, ]*12\)", text)


def test_reduce_zero_label_on_labels_from_zero_is_suspected(camvid):
    text = text_of(
        diagnose(config(camvid, reduce_zero_label=True), "val"), "classes that never occur"
    )
    assert "reduce_zero_label must be False" in text


def test_class_subset_is_mapped_as_the_config_does(camvid):
    classes = ("pole", "sky")
    model = dict(decode_head=dict(num_classes=2))
    train, _ = diagnose(config(camvid, model, metainfo=dict(classes=classes)))
    assert train.findings == []
    full, _ = diagnose(config(camvid))
    assert train.counts[0] == full.counts[2]
    assert train.counts[1] == full.counts[0]
    assert train.counts[255] == full.counts.sum() - full.counts[[0, 2]].sum()


def test_masks_of_0_and_255_throughout_are_an_error(camvid):
    set_labels(camvid, lambda x: 255 * (x > 0))
    findings = diagnose(config(camvid), "val")[0].findings
    assert "label values outside the classes" in {finding.kind for finding in findings}
    assert "no label has another value than 0 and 255" in "".join(map(str, findings))


def test_ignore_index_of_the_head_counts(camvid):
    set_labels(camvid, lambda x: np.where(x == 0, 255, x))
    assert not diagnose(config(camvid), "val")[0].bad
    model = dict(decode_head=dict(num_classes=11, ignore_index=0))
    diagnosis = diagnose(config(camvid, model), "val")[0]
    assert len(diagnosis.bad) == 4
    assert "this config ignores 0" in str(diagnosis.findings[0])


def test_palette_is_kept_by_pillow_and_lost_by_opencv(camvid):
    for path in (camvid / "annotations/val").iterdir():
        image = Image.fromarray(np.asarray(Image.open(path)), "P")
        image.putpalette(list(range(256)) * 3)
        image.save(path)
    assert not diagnose(config(camvid), "val")[0].bad
    pipeline = [PIPELINE[0], dict(type="LoadAnnotations", imdecode_backend="cv2")]
    findings = diagnose(config(camvid, pipeline=pipeline), "val")[0].findings
    assert [finding.kind for finding in findings] == ["label is not one channel"] * 4
    assert "imdecode_backend='pillow'" in findings[0].text


def test_image_that_exif_turns_differs_in_size(camvid):
    path = min((camvid / "images/val").iterdir())
    exif = Image.Exif()
    exif[274] = 6  # orientation: turned by 90 degrees
    Image.open(path).save(path, exif=exif)
    diagnoses = diagnose(config(camvid), "val")
    text = text_of(diagnoses, "image and label differ in size")
    assert text.endswith(
        "image 64x48, label 48x64 (height x width); an image that its EXIF data turns?"
    )


def test_heads_of_another_number_of_classes_are_an_error(camvid):
    model = dict(decode_head=[dict(num_classes=11), dict(num_classes=19)])
    text = text_of(diagnose(config(camvid, model), "val"), "model and dataset differ")
    assert text == "num_classes is [19] in the model's heads, the dataset has 11"


def test_preprocessor_of_another_range_is_seen(camvid):
    preprocessor = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], bgr_to_rgb=True)
    model = dict(MODEL, data_preprocessor=preprocessor)
    assert ("preprocessor does not fit", "") in found(diagnose(config(camvid, model), "val"))


def test_images_of_another_suffix_are_mentioned(camvid):
    diagnoses = diagnose(config(camvid, img_suffix=".png"), "val")
    assert "no image with the suffix '.png'; there are images with the suffix .jpg" in text_of(
        diagnoses, "no images"
    )


def test_the_same_files_are_examined_once(camvid):
    cfg = config(camvid)
    cfg.test_dataloader = cfg.val_dataloader
    *_, test = diagnose(cfg, "train", "val", "test")
    assert test.same_as == "val"
    assert test.findings == []
    assert "the same files as val" in format_report([test])


def test_duplicates_in_training_are_all_kept_out_when_validation_has_the_image(camvid):
    images = sorted((camvid / "images/train").iterdir())
    val = min((camvid / "images/val").iterdir())
    for image in images[:2]:
        shutil.copyfile(val, image)
    train, _ = diagnose(config(camvid))
    assert train.bad == {0, 1}


def test_images_are_compared_by_their_pixels(camvid):
    """The same image in another file format."""
    val = min((camvid / "images/val").iterdir())
    target = min((camvid / "images/train").iterdir())
    cv2.imwrite(str(target.with_suffix(".png")), cv2.imread(str(val)))
    target.with_suffix(".png").rename(target)
    assert diagnose(config(camvid))[0].bad == {0}


def test_wrappers_are_opened_and_named(camvid):
    train = [dataset(camvid, "train"), dict(type="RepeatDataset", dataset=dataset(camvid, "val"))]
    cfg = dict(train_dataloader=dict(dataset=dict(type="ConcatDataset", datasets=train)))
    one, two = open_parts(cfg, ("train", "val"))
    assert (one.name, len(one.samples)) == ("train.0", 24)
    assert (two.name, len(two.samples)) == ("train.1", 4)


def test_scenes_without_files_are_examined_too():
    loader = dict(dataset=dict(type="mmbcn.ShapesDataset", num_images=6, pipeline=PIPELINE))
    (diagnosis,) = diagnose(dict(train_dataloader=loader), "train")
    assert diagnosis.findings == []
    with pytest.raises(UsageError, match=r"ShapesDataset .* reads no list of files"):
        write_fix_lists([diagnosis], Path("list.txt"))


def test_a_dataset_class_with_few_arguments_is_opened(camvid):
    class Strict(CamVidDataset):
        def __init__(self, root, pipeline):
            super().__init__(
                data_prefix=dict(
                    img_path=f"{root}/images/val", seg_map_path=f"{root}/annotations/val"
                ),
                pipeline=pipeline,
            )

    cfg = dict(val_dataloader=dict(dataset=dict(type=Strict, root=str(camvid))))
    assert len(open_parts(cfg, ("val",))[0].samples) == 4


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(), "the config has no dataset in train_dataloader"),
        (
            dict(train_dataloader=dict(dataset=dict(type="NoSuchDataset"))),
            "the dataset NoSuchDataset of train cannot be built: KeyError",
        ),
        (
            dict(train_dataloader=dict(dataset=dict(type="PascalVOCDataset", ann_file="no.txt"))),
            "PascalVOCDataset of train cannot be built: AssertionError: Failed to load",
        ),
    ],
)
def test_what_cannot_be_built_ends_in_one_message(cfg, message):
    with pytest.raises(UsageError, match=message):
        open_parts(cfg, ("train",))


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
