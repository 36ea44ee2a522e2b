import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmbcn.datasets import write_shapes
from mmbcn.datasets.prepare.voc_aug import find_folders, make_labels, read_mat, write_lists
from mmbcn.datasets.shapes_scene import draw_scene
from mmbcn.errors import UsageError


@pytest.fixture
def voc(tmp_path):
    """VOC and SBD of scenes, without what the tool makes."""
    write_shapes(tmp_path, "voc", 4, 2, size=(40, 56), raw=True)
    for path in (tmp_path / "SegmentationClassAug").iterdir():
        path.unlink()
    (tmp_path / "ImageSets/Segmentation/aug.txt").unlink()
    return tmp_path


def read(path):
    return path.read_text().split()


def test_labels_and_lists_are_those_of_mmsegmentation(voc):
    folders = find_folders(voc, voc / "benchmark_RELEASE")
    assert make_labels(folders, 1) == (10, 0, [])
    for index in range(8):  # the training scenes 0 to 3, and 4 to 7, which SBD alone has
        label = np.asarray(Image.open(voc / f"SegmentationClassAug/shapes_{index:06d}_000000.png"))
        np.testing.assert_array_equal(label, draw_scene(0, index, 40, 56)[1])
        # as mmsegmentation's converter reads it
        mat = loadmat(voc / f"benchmark_RELEASE/dataset/cls/shapes_{index:06d}_000000.mat")
        np.testing.assert_array_equal(mat["GTcls"][0]["Segmentation"][0], label)
    assert write_lists(folders) == dict(trainaug=8, aug=4)
    lists = voc / "ImageSets/Segmentation"
    assert read(lists / "trainaug.txt") == [f"shapes_{i:06d}_000000" for i in range(8)]
    assert read(lists / "aug.txt") == [f"shapes_{i:06d}_000000" for i in range(4, 8)]
    assert make_labels(folders, 1) == (0, 10, [])


def test_devkit_and_dataset_folders_are_found_too(voc):
    (voc.parent / "VOC2012").symlink_to(voc)
    for folder in (voc, voc.parent):
        for sbd in ("benchmark_RELEASE", "benchmark_RELEASE/dataset"):
            found = find_folders(folder, voc / sbd)
            assert found.labels.resolve() == voc / "SegmentationClassAug"
            assert found.sbd == voc / "benchmark_RELEASE/dataset"
    with pytest.raises(UsageError, match=r"JPEGImages/cls.* not found\. Expected VOC2012"):
        find_folders(voc, voc / "JPEGImages")


def test_a_listed_image_without_its_mat_is_named(voc):
    (voc / "benchmark_RELEASE/dataset/cls/shapes_000005_000000.mat").unlink()
    with pytest.raises(UsageError, match=r"1 images of SBD's lists have no .mat.*shapes_000005"):
        make_labels(find_folders(voc, voc / "benchmark_RELEASE"), 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(GTcls=dict(Segmentation=np.full((3, 4), 21))), "expected classes 0 to 20 .* got 21"),
        (dict(GTcls=dict(Boundaries=np.zeros((3, 4)))), "GTcls.Segmentation, got ValueError"),
        (dict(other=1), "GTcls.Segmentation, got KeyError"),
        (None, "expected a MATLAB file"),
    ],
)
def test_bad_mat_is_refused(tmp_path, content, message):
    path = tmp_path / "a.mat"
    if content:
        savemat(path, content)
    else:
        path.write_bytes(b"no matlab file")
    with pytest.raises(UsageError, match=message):
        read_mat(path)


def test_truncated_mat_is_refused(voc):
    path = voc / "benchmark_RELEASE/dataset/cls/shapes_000005_000000.mat"
    data = path.read_bytes()
    for length in (0, 60, 130, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UsageError, match="expected a MATLAB file"):
            read_mat(path)
