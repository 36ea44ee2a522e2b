import hashlib
import os
import pickle
import runpy
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmengine import fileio
from mmengine.registry import DATASETS, DefaultScope
from mmseg.datasets import CityscapesDataset, PascalVOCDataset
from torch.utils.data import DataLoader

from mmbcn.datasets import CamVidDataset, ShapesDataset, shapes_scene, shapes_writer, write_shapes
from mmbcn.datasets.shapes_scene import CLASSES, draw_scene
from mmbcn.errors import UsageError

REPO = Path(__file__).parents[2]
TOOL = "tools/datasets/shapes.py"
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
# CRC-32 of scene 0 of seed 0 at 64x96. Whoever changes the scenes on purpose changes this number
# and measures again whatever was reported for them.
CHECKSUM = 2983495105


@pytest.fixture(autouse=True)
def _mmseg_scope():
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


@pytest.fixture(scope="module")
def scenes():
    """Images (150, 96, 128, 3) and labels of one seed."""
    pairs = [draw_scene(11, index, 96, 128) for index in range(150)]
    return tuple(np.stack(arrays) for arrays in zip(*pairs, strict=True))


def run_python(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )


def first(samples):
    return samples[0]


def unpack(sample):
    """Image (H, W, 3) and label (H, W) of what PackSegInputs made."""
    label = sample["data_samples"].gt_sem_seg.data[0].numpy()
    return sample["inputs"].permute(1, 2, 0).numpy(), label


# Scenes


def test_scene_is_the_same_in_every_process_and_on_every_machine():
    image, label = draw_scene(0, 0, 64, 96)
    checksum = zlib.crc32(image.tobytes() + label.tobytes())
    assert checksum == CHECKSUM
    code = (
        "import hashlib, mmbcn.datasets.shapes_scene as s;"
        "i, l = s.draw_scene(7, 3, 50, 70);"
        "print(hashlib.sha256(i.tobytes() + l.tobytes()).hexdigest())"
    )
    done = run_python("-c", code)
    draw_scene(7, 2, 50, 70)
    np.random.seed(0)
    image, label = draw_scene(7, 3, 50, 70)
    here = hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()
    assert done.stdout.split()[-1:] == [here], done.stderr


def test_scene_differs_with_seed_and_with_index():
    keys = [(seed, index) for seed in range(6) for index in range(6)]
    labels = {draw_scene(*key, 64, 64)[1].tobytes() for key in keys}
    assert len(labels) == len(keys)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (63, 101), (200, 50)])
def test_scene_has_its_size_and_known_labels(height, width):
    for index in range(20):
        image, label = draw_scene(0, index, height, width)
        assert image.shape == (height, width, 3)
        assert label.shape == (height, width)
        assert image.dtype == label.dtype == np.uint8
        assert label.max() < len(CLASSES)


def test_scenes_show_every_class_in_several_objects(scenes):
    _, labels = scenes
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert 0.5 < share[0] < 0.8
    assert (share[1:] > 0.02).all()
    assert np.mean([len(np.unique(label)) - 1 for label in labels]) > 2.5


def test_scenes_have_occlusion(monkeypatch):
    """The pixels of all objects are more than those that show an object."""
    drawn = []

    def counted(inside, u, v):
        mask = inside(u, v)
        drawn.append(mask.sum())
        return mask

    for name, inside in list(shapes_scene.SHAPES.items()):
        monkeypatch.setitem(shapes_scene.SHAPES, name, partial(counted, inside))
    occluded = 0
    for index in range(40):
        drawn.clear()
        _, label = draw_scene(11, index, 96, 128)
        assert shapes_scene.NUM_OBJECTS[0] <= len(drawn) <= shapes_scene.NUM_OBJECTS[1]
        occluded += sum(drawn) > 1.02 * (label > 0).sum()
    assert 6 <= occluded < 40  # by more than 2 % of the pixels; the rest touch less or not at all


def test_color_does_not_tell_the_class(scenes):
    """A Bayes classifier on colours, fit on 120 scenes, is near chance (1 / 7) on 30 others."""
    images, labels = scenes
    classes = len(CLASSES)
    codes = (images.astype(int) // 43) @ np.array([36, 6, 1])  # 6 x 6 x 6 bins
    counts = np.full((6**3, classes), 1e-6)
    np.add.at(counts, (codes[:120], labels[:120]), 1)
    guess = (counts / counts.sum(0)).argmax(1)[codes[120:]]
    recall = [(guess[labels[120:] == k] == k).mean() for k in range(classes)]
    assert np.mean(recall) < 1 / classes + 0.06


def test_every_class_has_a_pattern_of_its_own():
    assert list(shapes_scene.PATTERNS) == list(CLASSES)
    assert len({(draw, period) for draw, period in shapes_scene.PATTERNS.values()}) == len(CLASSES)


# The dataset and its storage backend


def test_dataset_is_built_by_name_and_goes_through_the_standard_pipeline():
    dataset = DATASETS.build(
        dict(type="mmbcn.ShapesDataset", num_images=4, size=[48, 72], seed=5, pipeline=PIPELINE)
    )
    assert isinstance(dataset, ShapesDataset)
    assert len(dataset) == 4
    assert dataset.metainfo["classes"] == CLASSES
    assert len(dataset.metainfo["palette"]) == len(CLASSES)
    for index, sample in enumerate(dataset):
        for got, expected in zip(unpack(sample), draw_scene(5, index, 48, 72), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataset_is_read_in_dataloader_workers(start):
    dataset = ShapesDataset(6, size=(32, 40), seed=2, pipeline=PIPELINE)
    loader = DataLoader(
        dataset, num_workers=2, collate_fn=first, multiprocessing_context=start, timeout=60
    )
    seen = [unpack(sample) for sample in loader]
    assert len(seen) == 6
    for index, pair in enumerate(seen):
        for got, expected in zip(pair, draw_scene(2, index, 32, 40), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_dataset_pickle_registers_the_backend_on_load(tmp_path):
    file = tmp_path / "dataset.pkl"
    file.write_bytes(pickle.dumps(ShapesDataset(1, size=(32, 32), seed=2, pipeline=PIPELINE)))
    code = (
        "import pathlib, pickle, sys;"
        "print(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())[0]['inputs'].long().sum())"
    )
    done = run_python("-c", code, file)
    expected = f"tensor({draw_scene(2, 0, 32, 32)[0].sum()})"
    assert done.stdout.split()[-1:] == [expected], done.stderr


def test_dataset_maps_labels_to_chosen_classes():
    metainfo = dict(classes=("background", "star", "disc"))
    full = ShapesDataset(8, seed=1, pipeline=PIPELINE)
    some = ShapesDataset(8, seed=1, metainfo=metainfo, pipeline=PIPELINE)
    star, disc = CLASSES.index("star"), CLASSES.index("disc")
    expected = np.full(256, 255)
    expected[[0, star, disc]] = 0, 1, 2
    for a, b in zip(full, some, strict=True):
        np.testing.assert_array_equal(expected[unpack(a)[1]], unpack(b)[1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(num_images=0), "num_images must be an integer of 1 or more, got 0"),
        (dict(num_images=2.5), "num_images"),
        (dict(num_images=1, size=(15, 128)), r"size must be \(height, width\)"),
        (dict(num_images=1, size=(64,)), "size"),
        (dict(num_images=1, size=64), "size"),
        (dict(num_images=1, size=(64.0, 64)), "size"),
        (dict(num_images=1, seed=-1), "seed must be an integer of 0 or more, got -1"),
    ],
)
def test_dataset_refuses_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        ShapesDataset(**args)


def test_dataset_refuses_misspelt_arguments():
    with pytest.raises(TypeError, match="num_imgs"):
        ShapesDataset(1, num_imgs=3)


@pytest.mark.parametrize(
    "uri",
    [
        "shapes://0/64x64/0_depth.png",
        "shapes://-1/64x64/0_image.png",
        "shapes://0/64x64/0_image.png/more",
        "shapes://0/64/0_image.png",
        "shapes://0/8x64/0_image.png",
    ],
)
def test_backend_refuses_bad_paths(uri):
    with pytest.raises(ValueError, match=r"expected a path like shapes://|size must be"):
        fileio.get(uri)


def test_backend_has_no_text():
    with pytest.raises(ValueError, match="is a PNG, not a text"):
        fileio.get_text("shapes://0/64x64/0_image.png")


def test_backend_draws_image_and_label_of_a_scene_once(monkeypatch):
    from mmbcn.datasets import shapes

    shapes._last_scene.cache_clear()
    dataset = ShapesDataset(3, size=(32, 32), pipeline=PIPELINE)
    assert len(list(dataset)) == 3
    assert shapes._last_scene.cache_info().misses == 3
    assert shapes._last_scene.cache_info().hits == 3


# On disk


def make_written(layout, root, split):
    """The dataset that reads ``split`` of ``layout`` as mmsegmentation's base configs do."""
    if layout == "cityscapes":
        prefix = dict(img_path=f"leftImg8bit/{split}", seg_map_path=f"gtFine/{split}")
        return CityscapesDataset(data_root=str(root), data_prefix=prefix, pipeline=PIPELINE)
    if layout == "camvid":
        prefix = dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}")
        return CamVidDataset(data_root=str(root), data_prefix=prefix, pipeline=PIPELINE)
    labels = "SegmentationClassAug" if split == "aug" else "SegmentationClass"
    return PascalVOCDataset(
        data_root=str(root),
        data_prefix=dict(img_path="JPEGImages", seg_map_path=labels),
        ann_file=f"ImageSets/Segmentation/{split}.txt",
        pipeline=PIPELINE,
    )


# split -> (seed, first index, count) for --train 3 --val 2 --seed 4
TRAIN, VAL, AUG = (8, 0, 3), (9, 0, 2), (8, 3, 3)


@pytest.mark.parametrize(
    ("layout", "splits"),
    [
        ("cityscapes", dict(train=[TRAIN], val=[VAL])),
        ("camvid", dict(train=[TRAIN], val=[VAL])),
        ("voc", dict(train=[TRAIN], val=[VAL], trainval=[TRAIN, VAL], aug=[AUG])),
    ],
)
def test_written_layout_is_read_by_its_dataset(tmp_path, layout, splits):
    counts = write_shapes(tmp_path / "new/set", layout, 3, 2, size=(48, 64), seed=4)
    assert counts == {s: ranges[0][2] for s, ranges in splits.items() if s != "trainval"}
    for split, ranges in splits.items():
        keys = [(seed, start + i) for seed, start, count in ranges for i in range(count)]
        dataset = make_written(layout, tmp_path / "new/set", split)
        assert len(dataset) == len(keys)
        pairs = sorted(zip(keys, dataset, strict=True), key=lambda pair: pair[0])
        for key, sample in pairs:
            image, label = unpack(sample)
            expected_image, expected_label = draw_scene(*key, 48, 64)
            np.testing.assert_array_equal(label, expected_label)
            error = np.abs(image.astype(int) - expected_image).mean()
            # JPEG halves the resolution of colour, the noise's too; other scenes are 50 off.
            assert error <= (0 if layout == "cityscapes" else 20)


def test_written_files_are_the_same_from_several_processes(tmp_path):
    for workers in (1, 2):
        write_shapes(tmp_path / str(workers), "camvid", 3, 2, size=(32, 32), workers=workers)
    one, two = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.*")}
        for root in (tmp_path / "1", tmp_path / "2")
    )
    assert len(one) == 10
    assert one == two


def test_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fails_at_last(seed, index, height, width):
        if index == 2:
            raise OSError("No space left on device")
        return draw_scene(seed, index, height, width)

    monkeypatch.setattr(shapes_writer, "draw_scene", fails_at_last)
    with pytest.raises(OSError, match="No space left"):
        write_shapes(tmp_path / "set", "cityscapes", 3, 1, size=(32, 32))
    assert list((tmp_path / "set").iterdir()) == []
    monkeypatch.undo()
    write_shapes(tmp_path / "set", "cityscapes", 3, 1, size=(32, 32))
    assert {p.name for p in (tmp_path / "set").iterdir()} == {"leftImg8bit", "gtFine"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(layout="coco"), "layout must be one of cityscapes, voc, camvid, got 'coco'"),
        (dict(num_val=0), "num_val must be 1 or more, got 0"),
        (dict(workers=0), "workers must be 1 or more"),
        (dict(size=(8, 8)), "size must be"),
    ],
)
def test_write_refuses_bad_arguments_and_makes_no_folder(tmp_path, args, message):
    with pytest.raises(UsageError, match=message):
        write_shapes(tmp_path / "set", **{"layout": "voc", **args})
    assert not (tmp_path / "set").exists()


def test_tool_writes_the_scenes_and_says_so(tmp_path):
    command = (TOOL, "--layout", "voc", "--out", tmp_path / "voc", "--train", 2, "--val", 1)
    done = run_python(*command, "--size", "32x48", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "wrote 2 train, 1 val, 2 aug scenes of 32x48" in done.stdout
    assert "next: python tools/train.py CONFIG" in done.stdout


def run_tool(monkeypatch, *args):
    """The tool in this process: how it ended."""
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / TOOL), run_name="__main__")
    return ended.value.code


def test_tool_touches_nothing_in_a_folder_that_holds_something(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    message = run_tool(monkeypatch, "--layout", "voc", "--out", tmp_path)
    assert message.startswith(
        f"error: {tmp_path} is there already and nothing in it is overwritten"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_tool_refuses_a_bad_size(tmp_path, monkeypatch, capsys):
    assert run_tool(monkeypatch, "--layout", "voc", "--out", tmp_path / "a", "--size", "32") == 2
    assert "expected HEIGHTxWIDTH, like 256x512, got '32'" in capsys.readouterr().err
    message = run_tool(monkeypatch, "--layout", "voc", "--out", tmp_path / "a", "--size", "8x8")
    assert message.startswith("error: size must be (height, width)")
    assert not (tmp_path / "a").exists()
