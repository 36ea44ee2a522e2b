import numpy as np
import pytest

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmcv.transforms import Compose
from mmengine.registry import TRANSFORMS, DefaultScope

from mmbcn.datasets import RandomScale


def results(height, width):
    """An image whose left part is 0 and right part 200, and the same as a label (0, 6)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 3 :] = 200
    label = (image[..., 0] > 0).astype(np.uint8) * 6
    return dict(img=image, gt_seg_map=label, img_shape=(height, width), seg_fields=["gt_seg_map"])


@pytest.mark.parametrize("size", [(63, 101), (240, 90)])
@pytest.mark.parametrize("ratio", [0.37, 1.0, 1.9])
def test_random_scale_is_relative_to_the_images_own_size(size, ratio):
    expected = tuple(round(n * ratio) for n in size)
    out = RandomScale((ratio, ratio))(results(*size))
    assert out["img"].shape == (*expected, 3)
    assert out["gt_seg_map"].shape == expected
    assert out["img_shape"] == expected
    assert out["scale_factor"] == pytest.approx((expected[1] / size[1], expected[0] / size[0]))


def test_random_scale_keeps_label_aligned_and_unmixed():
    np.random.seed(0)
    transform = RandomScale((0.5, 2.0))
    for _ in range(20):
        out = transform(results(50, 77))
        assert set(np.unique(out["gt_seg_map"])) == {0, 6}
        agree = (out["img"][..., 0] > 100) == (out["gt_seg_map"] == 6)
        assert (~agree).any(axis=0).sum() <= 1  # the column at the edge


def test_random_scale_draws_uniformly_from_the_range():
    np.random.seed(0)
    transform = RandomScale((0.5, 2.0))
    heights = np.array([transform(results(100, 20))["img"].shape[0] for _ in range(300)])
    assert heights.min() >= 50
    assert heights.max() <= 200
    assert np.quantile(heights, [0.1, 0.5, 0.9]) == pytest.approx([65, 125, 185], abs=12)


def test_random_scale_never_empties_an_image():
    assert RandomScale((0.01, 0.01))(results(9, 9))["img"].shape == (1, 1, 3)


def test_random_scale_resolves_by_name_from_mmseg():
    with DefaultScope.overwrite_default_scope("mmseg"):
        transform = TRANSFORMS.build(dict(type="mmbcn.RandomScale", ratio_range=[0.5, 0.75]))
        assert isinstance(transform, RandomScale)
        pipeline = Compose([dict(type="mmbcn.RandomScale", ratio_range=(2.0, 2.0))])
        assert pipeline(results(10, 12))["img_shape"] == (20, 24)


@pytest.mark.parametrize("ratio_range", [(0.0, 1.0), (2.0, 0.5), (-1.0, 1.0)])
def test_random_scale_refuses_bad_ranges(ratio_range):
    with pytest.raises(ValueError, match=r"ratio_range=\(smallest, largest\)"):
        RandomScale(ratio_range)
