"""The benchmarks run and write their rows."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmseg")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "options", "norms"),
    [
        ("norms", ["--shapes", "2,64,16,16", "--seconds", "0.1"], {"BatchNorm", "BCN", "MicroBCN"}),
        (
            "steps",
            ["--backbones", "r18", "--norms", "bcn", "--crop", "32", "32", "--seconds", "1"],
            {"bn", "bcn"},
        ),
        (
            "fold",
            ["--backbone", "r18", "--norms", "bn", "bcn", "--size", "32", "33", "--seconds", "1"],
            {"bn", "bcn"},
        ),
    ],
)
def test_benchmark_writes_rows(tmp_path, tool, options, norms):
    command = [sys.executable, ROOT / f"tools/benchmark/{tool}.py", "--out", tmp_path / "rows"]
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert norms <= {row["norm"] for row in rows}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    base = ("BatchNorm", "bn", "as it is")
    kind = "form" if tool == "fold" else "norm"
    assert all(float(r["ratio"]) == 1 for r in rows if r[kind] in base)
    table = (tmp_path / "rows.md").read_text()
    assert "| --- |" in table
    assert f"`python tools/benchmark/{tool}.py --out" in table
