"""Which files an input means, and the names of their results."""

from pathlib import Path

import pytest

from mmbcn.errors import UsageError
from mmbcn.inference.sources import find_sources, name_sources


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/deep/2.JPG", "a/notes.txt", "a/ride.avi", "b/1.png", "b/1.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


def names(*inputs, known=None, out="out"):
    named = name_sources(find_sources([str(i) for i in inputs], Path(out)), known or {})
    root = Path.cwd() / "in"
    return {name: str(source.path.relative_to(root)) for name, source in named.items()}


def test_folder_is_searched_to_its_depths(tree):
    assert names("in/a") == {"1": "a/1.png", "deep/2": "a/deep/2.JPG", "ride.avi": "a/ride.avi"}


def test_same_stems_have_names_of_their_own(tree):
    assert names("in/a/1.png", tree / "b/1.png") == {"1": "a/1.png", "b/1": "b/1.png"}
    assert names("in/b") == {"1.jpg": "b/1.jpg", "1.png": "b/1.png"}
    assert names("in/a", "in/b") == {
        **names("in/a"),
        **{"1.jpg": "b/1.jpg", "1.png": "b/1.png"},
    }


def test_pattern_names_count_from_its_fixed_part(tree):
    assert names("in/*/1.png") == {"a/1": "a/1.png", "b/1": "b/1.png"}
    deep = {"a/1": "a/1.png", "a/deep/2": "a/deep/2.JPG"}
    assert names("in/**/2.JPG", "in/**/1.png") == deep | {"b/1": "b/1.png"}
    (tree / "b/[1].png").touch()
    assert names(tree / "b/[1].png") == {"[1]": "b/[1].png"}  # a file of that very name


def test_names_given_before_stay(tree):
    known = {"1": str(tree / "a/1.png")}
    assert names("in/b/1.png", known=known) == {"b/1": "b/1.png"}
    assert names("in/b/1.png", "in/a/1.png", known=known) == {"b/1": "b/1.png", "1": "a/1.png"}


def test_no_name_is_in_the_way_of_anothers_results(tree):
    """An overlay of ride.avi is ride.avi.mp4, one of a.jpg is a.png."""
    for name in ("c/ride.avi", "c/ride.avi.mp4", "c/a.jpg", "c/a.png/x.png", "d/ride.avi/0.png"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    found = names("in/c", "in/d")
    images = {name: path for name, path in found.items() if path.endswith(("jpg", "png"))}
    results = [Path(f"{name}.png") for name in images]
    for name in found.keys() - images.keys():
        results += {Path(name), Path(f"{name.removesuffix('.mp4')}.mp4")}  # frames and overlays
    assert (len(found), len(images), len(set(results))) == (5, 3, len(results)), found
    assert not any(a in b.parents for a in results for b in results), found
    known = {name: str(tree / path) for name, path in found.items()}
    assert names("in/d", "in/c", known=known) == found
    other_order = {"a.png/x": "c/a.png/x.png", "c/a": "c/a.jpg"}
    assert names("in/c/*/x.png", "in/c/a.jpg") == other_order


def test_each_file_once_and_none_of_the_results(tree):
    assert names("in/a/1.png", "in/a", "in/a") == names("in/a")
    assert names("in/a", out="in/a/deep") == {"1": "a/1.png", "ride.avi": "a/ride.avi"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("in/c", "there is no file or folder in/c"),
        ("in/*.bmp", "no file matches in/.*bmp"),
        ("empty", "no image or video in empty"),
    ],
)
def test_nothing_found(tree, text, message):
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=message):
        find_sources([text], Path("out"))
