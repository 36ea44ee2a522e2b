"""The report of a comparison: its numbers, and the page in a real browser."""

import json
import re
from html import unescape

import numpy as np
import pytest

pytest.importorskip("mmseg")

from browser import show
from comparisons import made_up
from PIL import Image

from mmbcn import norm_names
from mmbcn.analysis.comparison.figures import color_of
from mmbcn.analysis.comparison.folder import Place
from mmbcn.analysis.comparison.report import write_report
from mmbcn.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison of three norms over three seeds, with its report."""
    out = tmp_path_factory.mktemp("comparison")
    made_up(out, "bn,gn_ws,bcn", 3)
    write_report(out)
    return out


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def text_of(html):
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))


def test_json_has_the_numbers(folder):
    report = json.loads((folder / "report.json").read_text())
    groups = {(g["norm"], g["batch_size"]): g for g in report["groups"]}
    assert len(groups) == 6
    # run number n has 20 + n; six runs a seed: bn, gn_ws, bcn at batch size 1, then at 2
    assert groups["gn_ws", 1]["miou"] == {"0": 21, "1": 27, "2": 33}
    assert groups["bcn", 2]["mean"] == 31
    assert groups["bcn", 2]["std"] == 6
    assert groups["bn", 1]["mean"] is None
    assert set(groups["bn", 1]["failures"]) == {"0", "1", "2"}
    assert [v["best"] for v in report["verdicts"]] == ["bcn", "bcn"]
    assert report["environments"] == dict(device=["abacus"], threads=[1], commit=["c0ffee"])
    assert report["missing"] == []


def test_page_asks_for_nothing(page):
    """All that it refers to is in it: styles, figures, pictures."""
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(addresses) > 20
    assert {a.split(",")[0][:5] for a in addresses if not a.startswith("#")} == {"data:"}
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page


def test_ids_of_the_page_are_unique(page):
    """The figures are separate files put together."""
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert {a or b for a, b in links} <= set(ids)


def test_page_tells_the_result(page):
    text = text_of(page)
    assert "bcn has the highest mIoU: 28.00 ± 6.00 (3 seeds)." in text
    assert "3 of 3 failed: more than 1 value" in text
    assert "per channel &lt;b&gt;" in page  # a reason is no HTML
    assert "18 of 18 runs have ended" in text
    assert "python tools/analysis/compare_norms.py CONFIG" in text
    assert "abacus" in text
    assert "runs/bcn-b2-lr0.0005-s0/config.py" in text
    assert "0.00025 at batch size 1, 0.0005 at batch size 2 (the config's: 0.002 at 8)" in text


def test_same_results_give_the_same_page(folder, page):
    write_report(folder)
    assert (folder / "report.html").read_text() == page


def test_every_norm_has_a_colour_of_its_own():
    names = {name.removesuffix("_ws") for name in norm_names()}
    assert len({color_of(name) for name in norm_names()}) == len(names)


def test_few_results_are_enough(tmp_path):
    """One seed, runs that have not ended, no pictures, no singularities; then nothing at all."""
    runs = made_up(tmp_path, "bn,bcn", 1, (1,))
    place = Place(tmp_path, runs[1])
    result = json.loads(place.result.read_text())
    place.result.write_text(json.dumps(result | dict(singularity={})))
    (place.folder / "predictions/0001_x.png").unlink()
    text = text_of(write_report(tmp_path).read_text())
    assert "Only bcn came to its end" in text
    place.result.unlink()
    text = text_of(write_report(tmp_path).read_text())
    assert "No run came to its end." in text
    assert f"1 run not ended: {runs[1].name}" in text
    Place(tmp_path, runs[0]).result.unlink()
    with pytest.raises(UsageError, match=r"no run in .* has ended yet"):
        write_report(tmp_path)


def test_page_in_a_browser(folder, tmp_path):
    shown = show(folder / "report.html", tmp_path, 4200)
    assert shown.complaints == []
    assert shown.requests == []
    table = re.search(r'<table id="miou">.*?</table>', shown.dom, re.DOTALL)[0]
    assert len(re.findall("<tr>", table)) == 4
    assert text_of(table).count("highest") == 2
    assert shown.dom.count("<svg") == 4
    assert shown.dom.count("<img") == 2 + 6 - 1
    pixels = np.asarray(Image.open(shown.picture).convert("RGB")).reshape(-1, 3)
    for color, least in (
        ((0x00, 0x72, 0xB2), 300),  # of bn, in figures
        ((0xD5, 0x5E, 0x00), 1000),  # of bcn
        ((200, 30, 30), 10000),  # of the first class, in label maps
    ):
        assert (pixels == color).all(1).sum() > least


def test_browser_notices_faults(tmp_path):
    """Guards the test above."""
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/gone.png"><script>nowhere()</script>')
    shown = show(page, tmp_path, 300)
    assert any("nowhere is not defined" in line for line in shown.complaints)
    assert set(shown.requests) == {"http://127.0.0.1:9/gone.png"}
