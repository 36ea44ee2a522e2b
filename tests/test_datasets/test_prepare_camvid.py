from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmbcn.datasets.prepare.camvid import COLORS, count_camvid, from_colors, make_camvid, split_of
from mmbcn.errors import UsageError

REPO = Path(__file__).parents[2]
ROOTS = [
    root for root in (REPO / "data/camvid", REPO.parent / "shared/data/camvid") if root.is_dir()
]
# SegNet's 11 classes, as colours of the 32-class release
GROUPS = [
    [(128, 128, 128)],
    [(0, 128, 64), (128, 0, 0), (64, 192, 0), (64, 0, 64), (192, 0, 128)],
    [(192, 192, 128), (0, 0, 64)],
    [(128, 64, 128), (128, 0, 192), (192, 0, 64)],
    [(0, 0, 192), (64, 192, 128), (128, 128, 192)],
    [(128, 128, 0), (192, 192, 0)],
    [(192, 128, 128), (128, 128, 64), (0, 64, 64)],
    [(64, 64, 128)],
    [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],
    [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],
    [(0, 128, 192), (192, 0, 192)],
]
STEMS = dict(train="0006R0_f00930", val="0016E5_07959", test="Seq05VD_f00000")


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def colored(label, rng):
    """A label of 11 classes in colours of the 32, BGR; each class in all of its colours."""
    result = np.zeros((*label.shape, 3), np.uint8)
    for index, colors in enumerate(GROUPS):
        choice = np.array(colors, np.uint8)[rng.integers(0, len(colors), label.shape)]
        result[label == index] = choice[label == index]
    return result[..., ::-1]


def release(root, kind, labels, images):
    """Write a release of either kind: labels and images by split."""
    rng = np.random.default_rng(0)
    for split, label in labels.items():
        stem = STEMS[split]
        if kind == 32:
            write(root / f"701_StillsRaw_full/{stem}.png", images[split])
            write(root / f"LabeledApproved_full/{stem}_L.png", colored(label, rng))
        else:
            write(root / f"{split}/{stem}.png", images[split])
            write(root / f"{split}annot/{stem}.png", np.where(label == 255, 11, label))


@pytest.fixture
def content():
    rng = np.random.default_rng(1)
    labels = {s: rng.choice([*range(11), 255], (30, 41)).astype(np.uint8) for s in STEMS}
    smooth = {s: rng.integers(0, 256, (3, 4, 3)).astype(np.uint8) for s in STEMS}
    return labels, {s: cv2.resize(image, (41, 30)) for s, image in smooth.items()}


def test_colors_are_32_different_ones_in_11_groups():
    assert len({color for color, _ in COLORS.values()}) == len(COLORS) == 32
    assert sum(map(len, GROUPS)) == 31  # and void
    for index, colors in enumerate(GROUPS):
        assert (from_colors(np.array([colors], np.uint8)) == index).all()
    assert (from_colors(np.zeros((2, 2, 3), np.uint8)) == 255).all()


@pytest.mark.parametrize("kind", [32, 11])
def test_either_release_is_converted(tmp_path, content, kind):
    labels, images = content
    release(tmp_path / "in", kind, labels, images)
    assert make_camvid(tmp_path / "in", tmp_path / "out", 1) == (6, 0, [])
    assert count_camvid(tmp_path / "out") == dict(train=1, val=1, test=1)
    for split, stem in STEMS.items():
        label = cv2.imread(str(tmp_path / f"out/annotations/{split}/{stem}.png"), -1)
        np.testing.assert_array_equal(label, labels[split])
        image = cv2.imread(str(tmp_path / f"out/images/{split}/{stem}.jpg"))
        assert np.abs(image.astype(int) - images[split]).mean() < 4  # JPEG; others are 40 off
    assert make_camvid(tmp_path / "in", tmp_path / "out", 1) == (0, 6, [])


def test_an_image_without_its_label_is_left_out_and_named(tmp_path, content):
    release(tmp_path / "in", 32, *content)
    (tmp_path / "in/LabeledApproved_full/Seq05VD_f00000_L.png").unlink()
    summary = make_camvid(tmp_path / "in", tmp_path / "out", 1)
    assert summary[:2] == (4, 0)
    assert "Seq05VD_f00000.png: left out, its label" in summary.failed[0]
    assert count_camvid(tmp_path / "out") == dict(train=1, val=1)


def test_colors_of_another_palette_are_refused():
    colors = np.full((10, 10, 3), 128, np.uint8)
    colors[0, 0] = 1, 2, 3  # a stray pixel is ignored
    assert from_colors(colors)[0, 0] == 255
    colors[1] = 4, 5, 6
    with pytest.raises(UsageError, match=r"11% of the pixels .* \(R, G, B\) = \(4, 5, 6\)"):
        from_colors(colors)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected 701_StillsRaw_full and LabeledApproved_full"):
        make_camvid(tmp_path, tmp_path / "out", 1)
    write(tmp_path / "701_StillsRaw_full/holiday.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UsageError, match=r"expected names like 0016E5_07959.png .* holiday.png"):
        make_camvid(tmp_path, tmp_path / "out", 1)


def test_void_of_segnet_is_the_highest_label(tmp_path, content):
    release(tmp_path / "in", 11, *content)
    stem = STEMS["val"]
    write(tmp_path / f"in/valannot/{stem}.png", np.full((30, 41), 12, np.uint8))
    summary = make_camvid(tmp_path / "in", tmp_path / "out", 1)
    assert [error.partition("valannot/")[2] for error in summary.failed] == [
        f"{stem}.png: expected classes 0 to 11, got 12"
    ]


def test_split_has_the_published_sizes():
    """The frames of the original release: every 30th of four sequences, every 2nd of one part."""
    stems = [f"0001TP_{i:06d}" for i in range(6690, 10381, 30)]
    stems += [f"0006R0_f{i:05d}" for i in range(930, 3931, 30)]
    stems += [f"0016E5_{i:05d}" for i in [*range(390, 2401, 30), *range(4350, 7921, 30)]]
    stems += [f"0016E5_{i:05d}" for i in [*range(7959, 8160, 2), *range(8190, 8641, 30)]]
    stems += [f"Seq05VD_f{i:05d}" for i in range(0, 5101, 30)]
    assert Counter(map(split_of, stems)) == dict(train=367, val=101, test=233)


@pytest.mark.skipif(not ROOTS, reason="needs data/camvid")
@pytest.mark.parametrize("split", ["train", "val"])
def test_split_is_that_of_the_real_data(split):
    stems = [path.stem for path in (ROOTS[0] / "images" / split).iterdir()]
    assert {split_of(stem) for stem in stems} == {split}


@pytest.mark.skipif(not ROOTS, reason="needs data/camvid")
@pytest.mark.parametrize("kind", [32, 11])
def test_real_labels_come_back(tmp_path, kind):
    stem = STEMS["val"]
    label = cv2.imread(str(ROOTS[0] / f"annotations/val/{stem}.png"), -1)
    image = cv2.imread(str(ROOTS[0] / f"images/val/{stem}.jpg"))
    release(tmp_path / "in", kind, dict(val=label), dict(val=image))
    (tmp_path / "in/trainannot").mkdir(exist_ok=True)
    make_camvid(tmp_path / "in", tmp_path / "out", 1).check()
    result = cv2.imread(str(tmp_path / f"out/annotations/val/{stem}.png"), -1)
    np.testing.assert_array_equal(result, label)
