"""APR-S: what it does to image and labels."""

import numpy as np
import pytest

pytest.importorskip("mmseg")

from mmbcn.datasets.transforms import APRSingle, apr_single
from mmbcn.errors import UsageError
from mmbcn.registry import TRANSFORMS


def scene(height=24, width=30, seed=0):
    """A picture whose labels can be read from its colours: red above 128 is class 1."""
    rng = np.random.default_rng(seed)
    label = (rng.random((height // 6, width // 6)) > 0.5).astype(np.uint8)
    label = label.repeat(6, 0).repeat(6, 1)
    image = rng.integers(20, 60, (height, width, 3), dtype=np.uint8)
    image[..., 2] += 150 * label
    return dict(img=image, gt_seg_map=label, seg_fields=["gt_seg_map"])


def run(transform, results, seed=0):
    np.random.seed(seed)
    return transform(dict(results, img=results["img"].copy()))


def test_is_registered_and_shows_its_settings():
    transform = TRANSFORMS.build(dict(type="mmbcn.APRSingle", prob=0.3, per_channel=True))
    assert repr(transform) == "APRSingle(prob=0.3, geometric=False, per_channel=True)"


def test_labels_are_untouched_and_images_stay_uint8():
    before, changed = scene(), 0
    label = before["gt_seg_map"].copy()
    for seed in range(40):
        after = run(APRSingle(prob=1.0), before, seed)
        assert after["gt_seg_map"] is before["gt_seg_map"]
        assert np.array_equal(after["gt_seg_map"], label)
        assert after["img"].dtype == np.uint8
        assert after["img"].shape == before["img"].shape
        assert after["img"].flags.c_contiguous
        changed += not np.array_equal(after["img"], before["img"])
    assert changed > 30


def test_seed_gives_the_same():
    first, second = (run(APRSingle(), scene(), seed=4)["img"] for _ in range(2))
    assert np.array_equal(first, second)


def test_without_recombination_one_operation_is_left(monkeypatch):
    monkeypatch.setattr(apr_single, "_PHOTOMETRIC", [lambda image: image // 2])
    before = scene()
    assert np.array_equal(run(APRSingle(prob=0.0), before)["img"], before["img"] // 2)


def test_one_of_both_recombinations_of_one_and_two_operations(monkeypatch):
    """The second operation is done on the result of the first; half of the results are each."""
    monkeypatch.setattr(apr_single, "_PHOTOMETRIC", [lambda image: 255 - image // 2])
    before = scene()
    before["img"] = np.ascontiguousarray(before["img"][:23, :29])
    once = 255 - before["img"] // 2
    twice = 255 - once // 2

    def expected(phase, amplitude):
        p, a = np.fft.fftn(phase.astype(float)), np.fft.fftn(amplitude.astype(float))
        mixed = np.fft.ifftn(np.abs(a) * np.exp(1j * np.angle(p))).real
        return np.clip(np.round(mixed), 0, 255)

    options = [expected(once, twice), expected(twice, once)]
    assert np.abs(options[0] - options[1]).max() > 20
    met = [0, 0]
    for seed in range(30):
        got = run(APRSingle(prob=1.0), before, seed)["img"].astype(float)
        off = [np.abs(got - option).max() for option in options]
        assert min(off) <= 1  # float32 may round the other way
        met[int(np.argmin(off))] += 1
    assert min(met) > 5


def test_identical_images_give_the_identity(monkeypatch):
    monkeypatch.setattr(apr_single, "_PHOTOMETRIC", [lambda image: image])
    before = scene()
    assert np.array_equal(run(APRSingle(prob=1.0), before)["img"], before["img"])


def test_values_outside_are_clipped_and_do_not_wrap_around(monkeypatch):
    """Light stripes whose amplitude comes from dark ones overshoot by far."""
    light = np.full((16, 16, 3), 250, np.uint8)
    light[:, ::5] = 0
    dark = np.zeros_like(light)
    dark[3, 3] = 255
    images = iter([light, dark])
    monkeypatch.setattr(apr_single, "_PHOTOMETRIC", [lambda image: next(images)])
    monkeypatch.setattr(np.random, "random", lambda: 0.0)  # phase of the first
    got = APRSingle(prob=1.0)(dict(img=light))["img"]
    p, a = np.fft.fftn(light.astype(float)), np.fft.fftn(dark.astype(float))
    exact = np.fft.ifftn(np.abs(a) * np.exp(1j * np.angle(p))).real
    assert exact.min() < -5
    assert np.all(got[exact < -1] == 0)
    assert np.abs(got - np.clip(exact, 0, 255)).max() <= 1


def test_geometric_operations_move_labels_with_the_phase():
    """Edges are in the phase: the labels fit the picture where they follow it."""
    agree = []
    for seed in range(60):
        after = run(APRSingle(prob=1.0, geometric=True), scene(60, 60, seed), seed)
        label, red = after["gt_seg_map"], after["img"][..., 2].astype(float)
        assert set(np.unique(label)) <= {0, 1, 255}
        inside = label != 255
        if np.ptp(red[inside]):
            agree.append(np.corrcoef(red[inside], label[inside])[0, 1])
    assert np.median(np.abs(agree)) > 0.9


def test_every_operation_gives_images():
    image = scene()["img"]
    for operation in apr_single._PHOTOMETRIC:
        np.random.seed(0)
        changed = operation(image)
        assert changed.dtype == np.uint8
        assert changed.shape == image.shape
    label = scene()["gt_seg_map"]
    for matrix in apr_single._GEOMETRIC:
        np.random.seed(3)
        assert np.abs(matrix(*label.shape) - np.eye(2, 3)).max() > 0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "expects a uint8 image"),
        (np.zeros((4, 4), np.uint8), "expects a uint8 image"),
    ],
)
def test_other_images_are_refused(image, message):
    with pytest.raises(UsageError, match=message):
        APRSingle()(dict(img=image))
    with pytest.raises(UsageError, match="prob between 0 and 1"):
        APRSingle(prob=1.5)
