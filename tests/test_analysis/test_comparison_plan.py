"""The plan of a comparison, and the configs of its runs."""

import copy
import math

import pytest
import torch

pytest.importorskip("mmseg")

from comparisons import shapes_config
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from mmbcn.analysis.comparison.plan import Rules, Run, make_plan, split_list
from mmbcn.analysis.comparison.settings import differences, run_config, write_config
from mmbcn.errors import UsageError

CFG = shapes_config()  # 300 iterations, batch size 8, lr 0.002; warm-up of 20 iterations


def plan(norms=("bcn",), batch_sizes=(8,), seeds=1, **options):
    return make_plan(CFG, Rules(norms, batch_sizes, seeds, **options))


def test_one_seed_after_the_other():
    runs = plan(("bn", "gn"), (1, 8), 2)
    assert [run.name for run in runs[:4]] == [
        "bn-b1-lr0.00025-s0",
        "gn-b1-lr0.00025-s0",
        "bn-b8-lr0.002-s0",
        "gn-b8-lr0.002-s0",
    ]
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert {run.iters for run in runs} == {300}


@pytest.mark.parametrize(
    ("rule", "rates"),
    [("linear", [0.0005, 0.002]), ("sqrt", [0.001, 0.002]), ("constant", [0.002, 0.002])],
)
def test_learning_rate_follows_the_batch_size(rule, rates):
    assert [run.lr for run in plan(batch_sizes=(2, 8), lr_rule=rule)] == rates


def test_every_rate_is_tried():
    runs = plan(("bn", "gn"), (2, 8), lrs=[0.1, 0.2])
    assert len(runs) == len(set(runs)) == 8
    assert {run.lr for run in runs} == {0.1, 0.2}


def test_equally_many_images():
    runs = plan(batch_sizes=(1, 2, 8), iters=30, equal="images")
    assert [run.iters for run in runs] == [240, 120, 30]
    assert {run.images for run in runs} == {240}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norms=()), "--norms is empty"),
        (dict(norms=("bn", "bn")), "--norms names one twice: bn,bn"),
        (dict(batch_sizes=(0,)), "--batch-sizes must be above 0, got 0"),
        (dict(seeds=0), "--seeds must be above 0, got 0"),
        (dict(iters=0), "--iters must be above 0, got 0"),
        (dict(lrs=[-0.1]), "--lrs must be above 0"),
        (dict(lrs=[0.1, math.inf]), "--lrs must be above 0, got inf"),
        (dict(lrs=[math.nan]), "--lrs must be above 0, got nan"),
        (dict(lrs=[0.1, 0.10000001]), "--lrs are too much alike"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(UsageError, match=message):
        plan(**options)


def test_config_of_epochs_is_refused():
    cfg = copy.deepcopy(CFG)
    cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=3)
    with pytest.raises(UsageError, match="trains for epochs"):
        make_plan(cfg, Rules(["bn"], [1], 1))


def test_list_is_split():
    assert split_list("bn,gn, bcn") == ["bn", "gn", "bcn"]


def test_run_has_its_settings():
    cfg = run_config(CFG, Run("gn_ws", 4, 0.001, 7, 30))
    assert cfg.model.backbone.norm_cfg.type == "mmbcn.AutoGroupNorm"
    assert cfg.model.backbone.conv_cfg.type == "mmbcn.WSConv2d"
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.train_cfg.max_iters == 30
    assert cfg.optim_wrapper.optimizer.lr == 0.001
    assert cfg.randomness.seed == 7
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end) == (0, 2)
    assert (poly.begin, poly.end) == (2, 30)
    assert poly.eta_min == pytest.approx(CFG.param_scheduler[1].eta_min / 2)
    assert cfg.test_dataloader == CFG.val_dataloader
    assert cfg.val_dataloader is None
    assert {"mmbcn.NonFiniteHook", "mmbcn.RecordHook"} <= {h["type"] for h in cfg.custom_hooks}
    assert CFG.param_scheduler[1].end == 300  # untouched


def test_short_warm_up_stays():
    warm_up, poly = run_config(CFG, Run("bn", 4, 0.001, 0, 5)).param_scheduler
    assert (warm_up.begin, warm_up.end, poly.begin, poly.end) == (0, 1, 1, 5)


def test_norm_that_is_unknown():
    with pytest.raises(UsageError, match="unknown norm 'bcm'; did you mean 'bcn'"):
        run_config(CFG, Run("bcm", 1, 0.1, 0, 5))


def test_runs_differ_in_nothing_else():
    """The rules, read off the configs."""
    a, b, c = (run_config(CFG, run) for run in plan(("bn", "bcn"), (8,), 2)[:3])
    assert {key.split(".")[2] for key in differences(a, b)} == {"norm_cfg"}
    assert differences(a, c) == ["randomness.seed"]


def test_written_config_is_the_same(tmp_path):
    cfg = run_config(CFG, Run("bn", 4, 0.001, 0, 5))
    path = tmp_path / "a/config.py"
    write_config(cfg, path)
    assert differences(Config.fromfile(path), cfg) == []
    moved = copy.deepcopy(cfg)
    moved.train_dataloader.dataset.data_root = "elsewhere"
    moved.train_dataloader.num_workers = 5
    write_config(moved, path)  # the data may lie anywhere
    assert Config.fromfile(path).train_dataloader.dataset.data_root == "elsewhere"
    cfg.model.decode_head.dropout_ratio = 0.7
    with pytest.raises(UsageError, match=r"other settings: model\.decode_head\.dropout_ratio\. "):
        write_config(cfg, path)


def test_norms_begin_with_the_same_weights():
    init_default_scope("mmseg")
    found = {}
    for norm in ("bn", "gn_ws", "bcn", "microbcn_ws"):
        model_cfg = run_config(CFG, Run(norm, 2, 0.1, 0, 5)).model
        torch.manual_seed(3)
        model = MODELS.build(model_cfg)
        model.init_weights()
        found[norm] = {k: v for k, v in model.state_dict().items() if v.dim() == 4}
    first = found.pop("bn")
    assert len(first) > 20
    for other in found.values():
        assert other.keys() == first.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_norms_and_batch_sizes_see_the_same_images(tmp_path):
    from mmbcn.engine import NormRunner

    seen = []
    for norm, batch in (("bn", 2), ("microbcn_ws", 2), ("bcn", 1)):
        cfg = run_config(CFG, Run(norm, batch, 0.1, 5, 4))
        cfg.work_dir, cfg.experiment_name = str(tmp_path / norm), f"same images {norm}"
        small = dict(num_images=9, size=(32, 32))
        loading = dict(num_workers=0, persistent_workers=False, dataset=small)
        cfg.merge_from_dict(dict(log_level="ERROR", train_dataloader=loading))
        runner = NormRunner.from_cfg(cfg)
        loader = runner.build_train_loop(cfg.train_cfg).dataloader
        images = []
        for data in loader:
            images += zip(data["inputs"], (s.img_path for s in data["data_samples"]), strict=True)
            if len(images) == 8:
                break
        seen.append(images)
    for other in seen[1:]:
        assert [path for _, path in other] == [path for _, path in seen[0]]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(other, seen[0], strict=True))
