"""The dataset doctor finds what is wrong, in scenes and, where they are there, in real data."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from doctor_case import config, diagnose, found, plant_faults, text_of

from mmbcn.datasets import write_shapes
from mmbcn.datasets.doctor import examine, format_report, open_parts
from mmbcn.datasets.doctor.causes import guess_cause
from mmbcn.datasets.doctor.examine import image_moments

REPO = Path(__file__).parents[2]
ROOTS = [
    root for root in (REPO / "data/camvid", REPO.parent / "shared/data/camvid") if root.is_dir()
]


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


@pytest.mark.parametrize("layout", ["camvid", "cityscapes"])
def test_damage_is_seen_before_a_lenient_decoder_hides_it(tmp_path, layout):
    """Half a JPEG, and a PNG with one wrong byte, which some decoders only warn of."""
    write_shapes(tmp_path, layout, 1, 1, size=(48, 64))
    (image,) = (*tmp_path.rglob("train/*.jpg"), *tmp_path.rglob("train/*/*leftImg8bit.png"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 255
    image.write_bytes(data if image.suffix == ".png" else data[: len(data) // 2])
    prefix = dict(img_path=str(image.parent))
    cfg = config(tmp_path, splits=("val",), data_prefix=prefix, img_suffix=image.suffix)
    text = text_of(diagnose(cfg, "val"), "unreadable image")
    assert text.startswith(f"{image}: damaged or truncated: ")


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
