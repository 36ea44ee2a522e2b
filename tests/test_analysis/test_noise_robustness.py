"""The measurement of weight noise, on a tiny model."""

import csv
import json

import pytest
import torch

pytest.importorskip("mmseg")

from robustness_case import make_case, run_tool

from mmbcn import set_norm
from mmbcn.analysis import evaluation, noise_robustness
from mmbcn.analysis.kept_results import KeptResults
from mmbcn.analysis.noise_robustness import Cell, plan, summarize
from mmbcn.errors import UsageError


def test_plan_and_summary():
    cells = plan(["additive"], [0.1, 0.2], 2, ["noisy", "calibrated"])
    assert [c.name for c in cells[:3]] == [
        "clean",
        "clean calibrated",
        "additive 0.1 chip 0 noisy",
    ]
    assert len(cells) == len({c.name for c in cells}) == 2 + 2 * 2 * 2
    rows = summarize(cells, {c.name: 50 - 100 * c.level + 2 * c.chip for c in cells})
    assert len(rows) == 2 + 4
    assert rows[0] == dict(noise="none", level=0.0, method="noisy", chips=1, miou=50, std="")
    last = dict(noise="additive", level=0.2, method="calibrated", chips=2)
    assert rows[-1] == dict(**last, miou=31.0, std=round(2**0.5, 3))


@pytest.fixture
def case(tmp_path, tiny_config):
    def make(norm="bcn_ws"):
        cfg = tiny_config(norm="", iters=1)
        set_norm(cfg.model, norm)
        return make_case(tmp_path, cfg)

    return make


ARGS = ["--noise", "additive", "--levels", "0.3", "--batch-size", "3"]


def test_tool_measures_keeps_and_goes_on(case, tmp_path, capsys, monkeypatch):
    config, checkpoint = case()
    out = tmp_path / "out"
    methods = ["--methods", "noisy", "calibrated", "tracked"]
    args = [config, checkpoint, *ARGS, "--out", out, *methods]
    before = checkpoint.read_bytes()
    run_tool("noise_robustness", *args, "--chips", "1")
    first = json.loads((out / "results.json").read_text())
    assert list(first["numbers"]) == [c.name for c in plan(["additive"], [0.3], 1, methods[1:])]
    assert all(0 <= n <= 100 for n in first["numbers"].values())

    measured = []
    true = noise_robustness.measure

    def measure(cell, *args):
        measured.append(cell.name)
        if len(measured) > 2:
            raise KeyboardInterrupt
        return true(cell, *args)

    monkeypatch.setattr(noise_robustness, "measure", measure)
    with pytest.raises(SystemExit):
        run_tool("noise_robustness", *args, "--chips", "2")
    monkeypatch.setattr(noise_robustness, "measure", true)
    assert all("chip 1" in name for name in measured)
    kept = json.loads((out / "results.json").read_text())["numbers"]
    assert len(kept) == len(first["numbers"]) + 2
    run_tool("noise_robustness", *args, "--chips", "2")
    final = json.loads((out / "results.json").read_text())["numbers"]
    assert kept.items() <= final.items()
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(r["method"], r["chips"]) for r in rows[3:]] == [(m, "2") for m in methods[1:]]
    assert (out / "results.png").stat().st_size > 1000
    assert "additive" in capsys.readouterr().out
    assert checkpoint.read_bytes() == before

    with pytest.raises(SystemExit, match=r"other settings .*test_images 4 there, 2 now"):
        run_tool("noise_robustness", *args, "--test-images", "2")
    run_tool("noise_robustness", *args, "--batch-size", "2")  # the same result
    other = ["--cfg-options", "train_dataloader.dataset.seed=9"]
    with pytest.raises(SystemExit, match=r"other settings \(calibration_set \w+ there, \w+ now\)"):
        run_tool("noise_robustness", *args, *other)


def test_one_pass_numbers_are_kept_apart_by_batch_size(case, tmp_path):
    config, checkpoint = case()
    args = [config, checkpoint, *ARGS[:-1], "3", "--one-pass", "--chips", "1"]
    args += ["--out", tmp_path / "out"]
    run_tool("noise_robustness", *args)
    with pytest.raises(SystemExit, match=r"other settings \(batch_size 3 there, 2 now\)"):
        run_tool("noise_robustness", *args, "--batch-size", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "inf"], "must be 0 or more, and finite, got inf"),
        (["--momentum", "5"], "momentum must be above 0 and at most 1, got 5.0"),
        (["--out", "model.pth"], "cannot write to the folder model.pth: model.pth is a file"),
        (["--out", "model.pth/a/b"], r"cannot write to the folder .*: .*/model\.pth is a file"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    case, tmp_path, options, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config, checkpoint = case()
    monkeypatch.setattr(noise_robustness, "measure", None)
    with pytest.raises(SystemExit, match=message):
        run_tool("noise_robustness", config, checkpoint, *options)


def test_model_without_running_statistics_is_measured_without_calibration(case, tmp_path, capsys):
    config, checkpoint = case("gn")
    out = tmp_path / "out"
    run_tool("noise_robustness", config, checkpoint, *ARGS, "--chips", "1", "--out", out)
    assert len(json.loads((out / "results.json").read_text())["numbers"]) == 2
    assert "nothing to calibrate" in capsys.readouterr().out


def test_cell_leaves_the_model_as_it_was(monkeypatch):
    """And the noise is there while statistics are measured, and while mIoU is."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 3, 5, 5)
    seen = []

    class Tests:
        def miou(self, model, progress):
            with torch.no_grad():
                seen.append(model(x))
            return 1.0

    monkeypatch.setattr(noise_robustness, "run_heads", lambda model, batch: model(batch))
    for method in ("noisy", "calibrated", "tracked"):
        cell = Cell("multiplicative", 0.5, 0, method)
        noise_robustness.measure(cell, model, Tests(), [x], 1.0, False, lambda title: None)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    noisy, calibrated, tracked = seen
    assert noisy.mean((0, 2, 3)).abs().max() > 0.05
    for y, of in ((calibrated, 99), (tracked, 100)):
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        expected = torch.full((4,), of / 100)
        torch.testing.assert_close(y.var((0, 2, 3), correction=0), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"settings": 3, "numbers": {}}',
        '{"settings": {}, "numbers": {"clean": null}}',
        "\xff",
    ],
)
def test_kept_results_refuse_a_foreign_file(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match="holds no results of this tool"):
        KeptResults(path, {})


def test_test_set_takes_images_from_all_over(tiny_config):
    cfg = tiny_config()
    loader = dict(num_workers=0, persistent_workers=False, dataset=dict(num_images=9))
    cfg.merge_from_dict(dict(test_dataloader=loader))
    tests = evaluation.TestSet(cfg, 3)
    names = [s.img_path for b in tests._batches for s in b["data_samples"]]
    every = [s.img_path for b in evaluation.TestSet(cfg)._batches for s in b["data_samples"]]
    assert names == every[::3]
    with pytest.raises(UsageError, match="must be 1 or more"):
        evaluation.TestSet(cfg, 0)
    cfg.test_evaluator = dict(type="IoUMetric", iou_metrics=["mDice"])

    class Perfect(torch.nn.Module):
        def test_step(self, batch):
            for sample in batch["data_samples"]:
                sample.pred_sem_seg = sample.gt_sem_seg
            return batch["data_samples"]

    with pytest.raises(UsageError, match="not mIoU"):
        evaluation.TestSet(cfg, 3).miou(Perfect())
    cfg.test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
    calls = []
    tests = evaluation.TestSet(cfg, 3)
    assert tests.miou(Perfect(), lambda *now: calls.append(now)) == 100
    assert tests.miou(Perfect()) == 100
    assert calls == [(1, 3), (2, 3), (3, 3)]
