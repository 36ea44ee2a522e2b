"""The measurement of corruptions, on a tiny model."""

import csv
import json

import pytest

pytest.importorskip("mmseg")

from robustness_case import make_case, run_tool

from mmbcn.analysis.corruption_robustness import CLEAN, draw, summarize
from mmbcn.analysis.evaluation import insert_transform


def test_summary():
    results = {CLEAN: 40.0, "fog 1": 30.0, "fog 5": 10.0, "snow 1": 20.0, "snow 5": 0.0}
    rows = summarize(["snow", "fog"], [1, 5], results)
    assert rows[0] == dict(corruption="snow", severity_1=20, severity_5=0, miou=10, relative=25)
    assert rows[1]["relative"] == 50
    assert rows[2] == dict(corruption="mean", severity_1=25, severity_5=5, miou=15, relative=37.5)
    assert rows[3]["miou"] == 40
    assert len(draw(rows, "").axes[0].patches) == 3


def test_transform_is_put_behind_the_loading_in_all_parts():
    def part():
        return dict(pipeline=[dict(type="mmseg.LoadImageFromFile"), dict(type="Resize")])

    dataset = dict(type="ConcatDataset", datasets=[part(), dict(dataset=part())])
    assert insert_transform(dataset, dict(type="X")) == 2
    for inner in (dataset["datasets"][0], dataset["datasets"][1]["dataset"]):
        assert [t["type"] for t in inner["pipeline"]][1] == "X"
        assert len(inner["pipeline"]) == 3
    assert insert_transform(dict(pipeline=[dict(type="Resize")]), dict(type="X")) == 0


def test_tool_measures_keeps_and_goes_on(tmp_path, tiny_config, capsys):
    pytest.importorskip("imagecorruptions")
    config, checkpoint = make_case(tmp_path, tiny_config(norm="", iters=1))
    out = tmp_path / "out"
    args = [config, checkpoint, "--out", out, "--num-images", 2, "--severities", 5]
    run_tool("corruption_robustness", *args, "--corruptions", "fog", "contrast")
    kept = json.loads((out / "results.json").read_text())["numbers"]
    assert set(kept) == {"clean", "fog 5", "contrast 5"}
    path = out / "results.json"
    marked = path.read_text().replace(str(kept["fog 5"]), "12.5")
    path.write_text(marked)
    run_tool("corruption_robustness", *args, "--corruptions", "fog", "jpeg_compression")
    rows = {r["corruption"]: r for r in csv.DictReader((out / "results.csv").open())}
    assert list(rows) == ["fog", "jpeg_compression", "mean", "clean"]
    assert rows["fog"]["severity_5"] == "12.5"  # not measured again
    assert (out / "results.png").stat().st_size > 1000
    assert "relative" in capsys.readouterr().out


def test_missing_library_is_named(tmp_path, tiny_config, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from mmbcn.datasets.transforms import corrupt

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(corrupt, "version", missing)
    config, checkpoint = make_case(tmp_path, tiny_config(norm="", iters=1))
    with pytest.raises(SystemExit, match=r"pip install 'mmbcn\[corruptions\]'"):
        run_tool("corruption_robustness", config, checkpoint)
