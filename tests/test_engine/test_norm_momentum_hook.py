"""The schedule of running statistics' momentum, in real trainings."""

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.hooks import Hook

from mmbcn import MicroBCN
from mmbcn.engine import NormMomentumHook, NormRunner
from mmbcn.errors import UsageError


class Seen(Hook):
    """The momentum of every layer that has one, and what the stem's statistics are made of."""

    priority = "LOWEST"

    def __init__(self):
        self.momentum, self.inputs = [], []

    def before_train(self, runner):
        layer = runner.model.backbone.stem[1]
        layer.register_forward_pre_hook(
            lambda m, x: self.inputs.append(x[0].detach().double()) if m.training else None
        )

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        modules = runner.model.modules()
        self.momentum.append({m.momentum for m in modules if hasattr(m, "momentum")})


def train(cfg, *hooks):
    cfg.visualizer.name = cfg.experiment_name  # mmengine keeps one object for each name
    runner = NormRunner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


@pytest.mark.parametrize(("norm", "power"), [("bn", 1), ("microbcn", 2), ("kn", 1)])
def test_momentum_decays_polynomially_and_comes_back(tiny_config, norm, power):
    cfg = tiny_config(norm, iters=4)
    cfg.default_hooks.norm_momentum = dict(type="mmbcn.NormMomentumHook", end=0.02, power=power)
    seen = Seen()
    runner = train(cfg, seen)
    expected = [0.02 + 0.08 * (1 - t / 4) ** power for t in range(4)]
    assert all(len(values) == 1 for values in seen.momentum)  # in all layers the same
    np.testing.assert_allclose([values.pop() for values in seen.momentum], expected)
    assert {m.momentum for m in runner.model.modules() if hasattr(m, "momentum")} == {0.1}


def test_running_statistics_follow_the_schedule(tiny_config):
    cfg = tiny_config("bn", iters=4)
    cfg.default_hooks.norm_momentum = dict(type="mmbcn.NormMomentumHook", end=0.02)
    seen = Seen()
    layer = train(cfg, seen).model.backbone.stem[1]
    mean = 0
    for t, x in enumerate(seen.inputs):
        rate = 0.02 + 0.08 * (1 - t / 4)
        mean = (1 - rate) * mean + rate * x.mean((0, 2, 3))
    assert len(seen.inputs) == 4
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_has_the_same_momentum(tiny_config, tmp_path):
    whole, rest = Seen(), Seen()
    cfg = tiny_config("bcn", iters=4)
    cfg.default_hooks.norm_momentum = dict(type="mmbcn.NormMomentumHook")
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=2)
    train(cfg, whole)
    again = Config(cfg._cfg_dict.to_dict())
    again.experiment_name += "-resumed"
    again.resume, again.load_from = True, f"{cfg.work_dir}/iter_2.pth"
    again.work_dir = str(tmp_path / "resumed")
    train(again, rest)
    assert rest.momentum == whole.momentum[2:]


def test_mistakes_are_named(tiny_config):
    for options, text in ((dict(end=0.0), "end must be above 0"), (dict(power=-1), "power")):
        with pytest.raises(UsageError, match=text):
            NormMomentumHook(**options)


def test_a_model_without_running_statistics_trains_as_ever(tiny_config):
    cfg = tiny_config("gn", iters=1)
    cfg.default_hooks.norm_momentum = dict(type="mmbcn.NormMomentumHook")
    assert train(cfg).iter == 1


def test_a_layer_that_takes_the_mean_of_all_is_left_alone():
    model = torch.nn.Sequential(MicroBCN(4, 2, momentum=None), torch.nn.BatchNorm2d(4))
    hook, runner = NormMomentumHook(end=0.5), Hook()
    runner.model, runner.iter, runner.max_iters = model, 3, 6
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    assert model[0].momentum is None
    assert model[1].momentum == pytest.approx(0.3)
