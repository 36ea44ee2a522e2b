"""The dataset doctor reads a dataset as its config does."""

import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from doctor_case import MODEL, PIPELINE, config, dataset, diagnose, found, set_labels, text_of

from mmbcn.datasets import CamVidDataset
from mmbcn.datasets.doctor import format_report, open_parts
from mmbcn.errors import UsageError


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
