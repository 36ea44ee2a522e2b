"""Common corruptions: deterministic, stronger with severity, labels as before."""

import numpy as np
import pytest

pytest.importorskip("mmseg")
pytest.importorskip("imagecorruptions")

from mmbcn.datasets.transforms import Corrupt
from mmbcn.datasets.transforms.corrupt import CORRUPTIONS
from mmbcn.errors import UsageError
from mmbcn.registry import TRANSFORMS

NAMES = [name for group in CORRUPTIONS.values() for name in group]
# By their published parameters these are not farther from clean at each severity than at the last
UNEVEN = ("glass_blur", "frost", "fog")


def picture(height=96, width=128):
    """Amplitudes that fall as 1/f, as in photographs."""
    rng = np.random.default_rng(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    falling = 1 / np.maximum(np.hypot(fy, fx), 1 / width)
    waves = np.fft.fft2(rng.normal(size=(3, height, width))) * falling
    image = np.fft.ifft2(waves).real.transpose(1, 2, 0)
    return (100 + 45 * image / image.std()).clip(0, 255).astype(np.uint8)


def run(name, severity, path="a/b.jpg", seed=0, image=None):
    label = np.arange(6, dtype=np.uint8)
    results = dict(img=picture() if image is None else image, img_path=path, gt_seg_map=label)
    out = Corrupt(name, severity, seed)(results)
    assert out["gt_seg_map"] is label
    assert np.array_equal(label, np.arange(6))
    return out["img"]


@pytest.mark.parametrize("name", NAMES)
def test_is_stronger_with_severity_and_deterministic(name):
    clean = picture().astype(float)
    state = np.random.get_state()[1].copy()
    images = [run(name, severity) for severity in range(1, 6)]
    assert np.array_equal(np.random.get_state()[1], state)
    for image in images:
        assert image.dtype == np.uint8
        assert image.shape == clean.shape
        assert image.flags.c_contiguous
    strength = [np.abs(image - clean).mean() for image in images]
    assert strength[0] > 0.5
    if name in UNEVEN:
        assert min(strength[2:]) > strength[0]
    else:
        assert np.all(np.diff(strength) > 0), strength
    np.random.seed(77)
    assert np.array_equal(run(name, 3, "elsewhere/b.jpg"), images[2])


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "frost"])
def test_chance_is_that_of_seed_and_file(name):
    first = run(name, 3)
    assert not np.array_equal(first, run(name, 3, "a/c.jpg"))
    assert not np.array_equal(first, run(name, 3, seed=1))


def test_colours_are_taken_as_bgr():
    """Brightness raises the value in HSV, by 0.5 at severity 5, and keeps the hue."""
    image = np.full((32, 32, 3), (20, 60, 100), np.uint8)  # red is the strongest
    changed = run("brightness", 5, image=image)[0, 0].astype(float)
    assert changed == pytest.approx(np.array([20, 60, 100]) * (100 + 127.5) / 100, abs=1)
    assert TRANSFORMS.build(dict(type="mmbcn.Corrupt", name="fog", severity=2)).severity == 2


def test_means_of_what_is_added_are_the_published_ones():
    gray = np.full((64, 64, 3), 128, np.uint8)
    noisy = run("gaussian_noise", 1, image=gray).astype(float)
    assert noisy.std() / 255 == pytest.approx(0.08, rel=0.05)
    changed = (run("impulse_noise", 5, image=gray) != gray).mean()
    assert changed == pytest.approx(0.27, abs=0.02)
    low = run("contrast", 2).astype(float)
    assert low.std() / picture().std() < 0.35


@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes(name, capsys):
    image = picture(33, 50)
    assert run(name, 2, image=image).shape == image.shape
    assert not capsys.readouterr().out


def test_mistakes_say_what_to_do():
    with pytest.raises(UsageError, match="unknown corruption 'rain'; known: gaussian_noise, shot"):
        Corrupt("rain", 1)
    with pytest.raises(UsageError, match="severity must be one of"):
        Corrupt("fog", 6)
    with pytest.raises(UsageError, match="severity must be one of"):
        Corrupt("fog", 1.0)
    with pytest.raises(UsageError, match="H and W of 32 and more, got uint8 \\(31, 40, 3\\)"):
        run("fog", 1, image=np.zeros((31, 40, 3), np.uint8))
