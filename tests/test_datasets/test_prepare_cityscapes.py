import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmseg.datasets import CityscapesDataset

from mmbcn.datasets import write_shapes
from mmbcn.datasets.prepare.cityscapes import LABELS, count_train_ids, make_train_ids, train_ids
from mmbcn.datasets.shapes_raw import cityscapes_polygons
from mmbcn.datasets.shapes_scene import draw_scene
from mmbcn.errors import UsageError

# The ids of the 19 classes in the published label images, in the order of their train ids.
PUBLISHED_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def write_polygons(path, objects, height=20, width=30):
    things = [dict(label=label, polygon=polygon) for label, polygon in objects]
    path.write_text(json.dumps(dict(imgHeight=height, imgWidth=width, objects=things)))
    return path


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def test_table_is_the_published_one():
    assert [label.id for label in LABELS] == list(range(34))
    evaluated = sorted((label for label in LABELS if label.train_id != 255), key=lambda x: x[2])
    assert [label.train_id for label in evaluated] == list(range(19))
    assert [label.id for label in evaluated] == PUBLISHED_IDS
    assert [label.name for label in evaluated] == list(CityscapesDataset.METAINFO["classes"])
    ignored = {label.name for label in LABELS if label.train_id == 255}
    assert ignored == {
        *("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic"),
        *("ground", "parking", "rail track", "guard rail", "bridge", "tunnel", "polegroup"),
        *("caravan", "trailer"),
    }


def test_table_is_that_of_cityscapesscripts():
    theirs = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    table = [(label.name, label.id, label.trainId) for label in theirs if label.id >= 0]
    assert [tuple(label) for label in LABELS] == table


def test_polygons_are_drawn_in_order_without_number_plates_and_with_groups(tmp_path):
    path = write_polygons(
        tmp_path / "a_polygons.json",
        [
            ("road", box(0, 5, 29, 19)),
            ("cargroup", box(2, 6, 11, 9)),  # cars
            ("license plate", box(4, 7, 6, 8)),  # not drawn
            ("polegroup", box(20, 0, 21, 19)),  # a label of its own, ignored
            ("sky", box(-10, -10, 40, 2)),  # over the border
        ],
    )
    expected = np.full((20, 30), 255)
    expected[5:] = 0
    expected[6:10, 2:12] = 13
    expected[:, 20:22] = 255
    expected[:3] = 10
    np.testing.assert_array_equal(train_ids(path), expected)


def test_deleted_objects_are_not_drawn(tmp_path):
    path = tmp_path / "a_polygons.json"
    thing = dict(label="road", polygon=box(0, 0, 3, 3), deleted=1)
    path.write_text(json.dumps(dict(imgHeight=4, imgWidth=4, objects=[thing])))
    assert (train_ids(path) == 255).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"imgHeight": 4', "expected JSON with imgWidth, imgHeight and objects"),
        ('{"imgHeight": 4, "objects": []}', "expected JSON with imgWidth.*'imgWidth'"),
        (
            '{"imgHeight": 4, "imgWidth": 4, "objects": [{"label": "cow", "polygon": []}]}',
            "the label 'cow' is not one of Cityscapes'",
        ),
        (
            '{"imgHeight": 4, "imgWidth": 4, "objects": [{"label": "car", "polygon": [[1]]}]}',
            "expected JSON",
        ),
    ],
)
def test_bad_polygons_are_refused(tmp_path, text, message):
    path = tmp_path / "a_polygons.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        train_ids(path)


def test_ids_become_train_ids(tmp_path):
    path = tmp_path / "a_labelIds.png"
    Image.fromarray(np.arange(34, dtype=np.uint8)[None]).save(path)
    expected = np.full(34, 255)
    expected[PUBLISHED_IDS] = range(19)
    np.testing.assert_array_equal(train_ids(path)[0], expected)
    Image.fromarray(np.array([[0, 40]], np.uint8)).save(path)
    with pytest.raises(UsageError, match=r"expected label ids of 0 to 33, got \[40\]"):
        train_ids(path)


def test_written_polygons_give_exactly_the_map(tmp_path):
    """Holes, components inside holes, single pixels and diagonals included."""
    rng = np.random.default_rng(0)
    maps = [draw_scene(3, index, 63, 101)[1] for index in range(5)]
    maps += [rng.integers(0, n, (40, 50)).astype(np.uint8) for n in (1, 2, 4)]
    for label in maps:
        path = tmp_path / "a_polygons.json"
        path.write_bytes(cityscapes_polygons(label))
        np.testing.assert_array_equal(train_ids(path), label)


@pytest.mark.parametrize("source", ["polygons", "labelIds", None])
def test_train_ids_are_made_for_all_and_only_once(tmp_path, source):
    write_shapes(tmp_path, "cityscapes", 3, 2, size=(48, 64), raw=True)
    if source:
        other = dict(polygons="labelIds.png", labelIds="polygons.json")[source]
        for path in tmp_path.rglob(f"*{other}"):
            path.unlink()
    truth = {path: np.asarray(Image.open(path)) for path in tmp_path.rglob("*labelTrainIds.png")}
    for path in truth:
        path.unlink()
    assert make_train_ids(tmp_path, source, 1) == (5, 0, [])
    assert count_train_ids(tmp_path) == dict(train=3, val=2)
    for path, label in truth.items():
        np.testing.assert_array_equal(np.asarray(Image.open(path)), label)
    next(iter(truth)).unlink()
    assert make_train_ids(tmp_path, None, 1) == (1, 4, [])


def test_missing_annotations_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"no \*_labelIds.png or \*_polygons.json in .*gtFine"):
        make_train_ids(tmp_path, None, 1)
