"""Runs of a comparison: those that are skipped, fail, diverge, are killed and go on."""

import copy
import fcntl
import json
import shutil
import signal
import time

import pytest

pytest.importorskip("mmseg")

from comparisons import pretend, quick_configs, shapes_config

from mmbcn.analysis.comparison import process
from mmbcn.analysis.comparison.execute import Executor
from mmbcn.analysis.comparison.folder import Place, prepare, read_comparison
from mmbcn.analysis.comparison.plan import Rules, make_plan
from mmbcn.analysis.comparison.process import last_words
from mmbcn.analysis.comparison.scalars import last_iteration, read_scalars
from mmbcn.errors import UsageError

CFG = shapes_config()
BN, GN, BCN = "BN", "mmbcn.AutoGroupNorm", "mmbcn.BCN"


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs a comparison with tools that pretend to train; its results, by norm."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(process, "tools_folder", lambda: tmp_path / "tools")

    def run(norms="bn,gn,bcn", jobs=2, told=None, retry_failed=False, watch=lambda *_: None):
        pretend(tmp_path / "tools", **(told or {}))
        rules = Rules(norms.split(","), [2], 1, iters=6)
        runs = make_plan(CFG, rules)
        with quick_configs():
            prepare(CFG, "config.py", rules, runs, tmp_path / "out", f"compare {norms}")
        missing = [r for r in runs if not Place(tmp_path / "out", r).is_finished(retry_failed)]
        executor = Executor(tmp_path / "out", jobs)
        ended = executor.run_all(missing, lambda *args: watch(executor, *args))
        results = {one.norm: result for one, result in ended}
        run.busy = {one.norm for one in executor.busy}
        return results

    run.place = lambda norm: Place(
        tmp_path / "out", make_plan(CFG, Rules([norm], [2], 1, iters=6))[0]
    )
    return run


def test_results_are_kept(compare):
    found = compare("bn,bcn")
    for norm, result in found.items():
        assert json.loads(compare.place(norm).result.read_text()) == result
        assert result["status"] == "done"
        assert result["class_iou"] == dict(a=25, b=75, c=None)
        assert result["miou"] == 50  # of the two classes that are there
        assert result["curve"]["iter"] == [1, 2, 3, 4, 5, 6]
        assert result["curve"]["loss"][2] == pytest.approx(1 / 3)
        assert result["step_seconds"] == pytest.approx(0.25 + 0.04)  # median without the first
        assert (compare.place(norm).folder / "predictions/0001_x_y.png").is_file()
    out = compare.place("bn").out
    assert {p.name for p in (out / "images").iterdir()} == {
        "0001_x_y_image.jpg",
        "0001_x_y_truth.png",
    }


def test_finished_runs_are_skipped(compare):
    compare("bn,gn")
    (compare.place("bn").folder / "work/iter_6.pth").unlink()  # heavy files may be removed
    assert list(compare("bn,gn,bcn")) == ["bcn"]
    known = read_comparison(compare.place("bn").out)
    assert known["commands"] == ["compare bn,gn", "compare bn,gn,bcn"]
    assert [run["norm"] for run in known["runs"]] == ["bn", "gn", "bcn"]


def test_failed_run_is_a_result(compare):
    found = compare(told={BN: "error", GN: "crash"})
    assert {norm: r["status"] for norm, r in found.items()} == dict(
        bn="failed", gn="failed", bcn="done"
    )
    assert found["bn"]["reason"] == "of the user\nwho reads on"
    assert found["gn"]["reason"] == "RuntimeError: struck"
    assert found["bn"]["curve"]["iter"] == [1, 2, 3, 4, 5, 6]
    assert not compare()
    assert set(compare(retry_failed=True)) == {"bn", "gn"}


def test_loss_that_is_not_finite_is_divergence(compare):
    result = compare("bn", told={BN: "nan"})["bn"]
    assert result["status"] == "diverged"
    written = json.loads(compare.place("bn").result.read_text())  # strict JSON has no NaN
    assert written["curve"]["loss"] == [None] * 6


def test_killed_run_goes_on(compare):
    assert compare("bn,bcn", told={BCN: "killed"})["bcn"] is None
    assert not compare.busy
    assert not compare.place("bcn").result.is_file()
    found = compare("bn,bcn")
    assert list(found) == ["bcn"]
    log = (compare.place("bcn").work / "training.log").read_text()
    assert "resumed at 3 True" in log
    assert found["bcn"]["curve"]["iter"] == [1, 2, 3, 4, 5, 6]  # of both attempts


def test_stopping_ends_all_processes(compare):
    def stop(executor, run, title, iters):
        if iters >= 3:
            executor.stop.set()

    start = time.monotonic()
    found = compare("bn,bcn,gn", jobs=2, told={BN: "hang", BCN: "hang"}, watch=stop)
    assert time.monotonic() - start < 20
    assert found["bn"] is found["bcn"] is found["gn"] is None
    assert set(compare("bn,bcn,gn")) == {"bn", "bcn", "gn"}


def test_training_that_is_done_is_only_tested(compare):
    assert compare("bn", told={BN: "error"})["bn"]["status"] == "failed"
    place = compare.place("bn")
    place.result.unlink()
    place.checkpoint.write_text("")
    assert compare("bn", told={BN: "error"})["bn"]["status"] == "done"


def test_run_of_another_process_is_left_alone(compare):
    place = compare.place("bn")
    place.work.mkdir(parents=True)
    with (place.work / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compare("bn") == dict(bn=None)
        assert compare.busy == {"bn"}
    assert compare("bn")["bn"]["status"] == "done"


def test_threads_are_divided(compare, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    compare("bn", jobs=3)
    assert "threads 2 " in (compare.place("bn").work / "training.log").read_text()


def test_jobs_run_at_a_time(compare):
    """Each of two that hang is seen before either ends."""
    seen = set()

    def stop_when_both_are_seen(executor, run, title, iters):
        if iters >= 3:
            seen.add(run.norm)
        if len(seen) == 2:
            executor.stop.set()

    compare("bn,bcn", jobs=2, told={BN: "hang", BCN: "hang"}, watch=stop_when_both_are_seen)
    assert seen == {"bn", "bcn"}


def test_no_job_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="--jobs must be 1 or more, got 0"):
        Executor(tmp_path, 0)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"run": {}, "status": "done"}'])
def test_run_with_a_damaged_result_is_finished_anew(compare, content):
    before = compare("bn,gn")["gn"]
    compare.place("gn").result.write_text(content)
    after = compare("bn,gn")
    assert list(after) == ["gn"]
    assert after["gn"]["miou"] == before["miou"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": [{"norm": "bn"}]}'])
def test_damaged_comparison_is_told(compare, content):
    compare("bn")
    out = compare.place("bn").out
    (out / "comparison.json").write_text(content)
    with pytest.raises(UsageError, match=r"comparison\.json cannot be read"):
        compare("bn,gn")
    (out / "comparison.json").unlink()
    assert list(compare("bn,gn")) == ["gn"]


def test_damaged_config_of_a_run_is_told(compare):
    compare("bn")
    compare.place("bn").config.write_text("model = dict(")
    with pytest.raises(UsageError, match=r"cannot read .*bn-b2-lr0\.0005-s0/config\.py"):
        compare("bn,gn")


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (dict(iters=8), {}, "has 6 iterations, gn-b2-lr0.0005-s0 would have 8"),
        (dict(batch_sizes=[4], equal="images"), {}, "have --equal iterations, now it is images"),
        ({}, {"optim_wrapper.optimizer.momentum": 0.5}, "of other settings: .*momentum"),
    ],
)
def test_runs_of_other_rules_are_not_mixed(compare, options, changed, message):
    compare("bn")
    out = compare.place("bn").out
    before = (out / "comparison.json").read_text()
    cfg = copy.deepcopy(CFG)
    cfg.merge_from_dict(changed)
    rules = Rules(**dict(norms=["gn"], batch_sizes=[2], seeds=1, iters=6) | options)
    with quick_configs(), pytest.raises(UsageError, match=message):
        prepare(cfg, "config.py", rules, make_plan(cfg, rules), out, "compare gn")
    assert (out / "comparison.json").read_text() == before
    assert not list(out.glob("runs/gn*"))


def test_removed_run_is_forgotten(compare):
    compare("bn,gn")
    shutil.rmtree(compare.place("gn").folder)
    assert not compare("bn")
    known = read_comparison(compare.place("bn").out)
    assert [run["norm"] for run in known["runs"]] == ["bn"]


def test_folder_without_a_comparison(tmp_path):
    with pytest.raises(UsageError, match="holds no comparison"):
        read_comparison(tmp_path)


def test_interrupted_codes():
    """Ended by a signal or with the code of one; an error of its own is no interruption."""

    def ended(code):
        return process.Ended(code, 0, None, "").interrupted

    assert all(map(ended, (-signal.SIGKILL, -signal.SIGTERM, 130, 143)))
    assert not any(map(ended, (0, 1, 2, -signal.SIGSEGV)))


def test_last_words():
    assert last_words("log\nerror: what\n  to do\n") == "what\n  to do"
    assert last_words("Traceback\nValueError: no\n\n") == "ValueError: no"
    assert last_words("") == "no output"


def test_scalars_of_several_attempts(tmp_path):
    """Iterations that were run again count once; a half line is left out."""
    for name, steps in (("20260101_1", (1, 2, 3)), ("20260101_2", (3, 4))):
        path = tmp_path / name / "vis_data/scalars.json"
        path.parent.mkdir(parents=True)
        lines = [json.dumps(dict(loss=f"{name} {step}", step=step)) for step in steps]
        path.write_text("\n".join([*lines, json.dumps(dict(kl=1, step=9)), '{"loss": 0.']))
    found = [point["loss"].split("_")[1] for point in read_scalars(tmp_path, "loss")]
    assert found == ["1 1", "1 2", "2 3", "2 4"]
    assert [point["step"] for point in read_scalars(tmp_path, "kl")] == [9]
    assert last_iteration(tmp_path / "none") == 0
