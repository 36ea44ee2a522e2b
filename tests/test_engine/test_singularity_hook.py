"""The hook's scalars against a direct computation on the same batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.hooks import Hook

from mmbcn.engine import NormRunner

LAYERS = [
    *("backbone.stem.1", "backbone.stem.4", "backbone.stem.7"),
    *(f"backbone.layer{i}.{j}.bn1" for i in range(1, 5) for j in range(2)),
    *("decode_head.image_pool.1.bn", *(f"decode_head.aspp_modules.{i}.bn" for i in range(4))),
    *("decode_head.bottleneck.bn", "auxiliary_head.convs.0.bn"),
]


class Store(Hook):
    """Every output of the layers, by iteration, and the affine that made it."""

    def __init__(self):
        self.values = {}

    def before_train(self, runner):
        def keep(name, layer, _, output):
            if torch.is_grad_enabled():
                affine = [layer.weight.detach().clone(), layer.bias.detach().clone()]
                seen = output.detach().double().transpose(0, 1).flatten(1).numpy().copy()
                self.values[runner.iter + 1, name] = seen, affine

        for name in LAYERS:
            layer = runner.model.get_submodule(name)
            layer.register_forward_hook(lambda *a, name=name: keep(name, *a))


def train(cfg, *hooks):
    cfg.visualizer.name = cfg.experiment_name  # mmengine keeps one object for each name
    runner = NormRunner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def scalars(cfg):
    [path] = Path(cfg.work_dir).glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row.pop("step"): row for row in rows if any("singularity" in key for key in row)}


def test_scalars_equal_a_direct_computation(tiny_config):
    cfg = tiny_config("bn", iters=5)
    cfg.default_hooks.singularity = dict(type="mmbcn.SingularityHook", interval=2)
    store = Store()
    train(cfg, store)
    logged = scalars(cfg)
    assert list(logged) == [2, 4]
    for step, row in logged.items():
        expected, few = {}, []
        for name in LAYERS:
            values, (weight, bias) = store.values[step, name]
            mean, std = values.mean(1), values.std(1)
            plain = (mean - bias.numpy()) / weight.numpy(), std / np.abs(weight.numpy())
            var = np.maximum(plain[1] ** 2, 1e-5)
            kl = (var + plain[0] ** 2 - 1 - np.log(var)) / 2
            dead = ((values > 0).mean(1) < 0.01).mean()
            measures = dict(sigma_mu=mean.std(), sigma_sigma=std.std(), dead=dead, kl=kl.mean())
            expected |= {f"singularity/{name}/{k}": v for k, v in measures.items()}
            if values.shape[1] < 32:
                few.append(name)
        assert few == ["decode_head.image_pool.1.bn"]  # a value for each image: not in the means
        for measure in ("sigma_mu", "sigma_sigma", "dead", "kl"):
            of_layers = [
                v
                for k, v in expected.items()
                if k.endswith(f"/{measure}") and k.split("/")[1] not in few
            ]
            expected[f"singularity/{measure}"] = np.mean(of_layers)
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


def test_run_is_not_changed(tiny_config):
    """Weights and statistics are bit by bit those of a run without the hook."""
    states = []
    for hooks in ({}, dict(singularity=dict(type="mmbcn.SingularityHook", interval=1))):
        cfg = tiny_config("microbcn", iters=3)
        cfg.model.backbone.with_cp = True  # the backward pass runs the blocks again
        cfg.default_hooks.update(hooks)
        runner = train(cfg)
        states.append(runner.model.state_dict())
        assert not runner.model._forward_hooks
        assert not runner.model._forward_pre_hooks
    assert len(scalars(cfg)) == 3
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_off_by_default(tiny_config):
    cfg = tiny_config(iters=1)
    assert "Singularity" not in repr(cfg)


def test_mistakes_are_not_hidden(tiny_config):
    """An exception in the forward pass leaves no watch behind."""
    cfg = tiny_config(iters=2)
    cfg.default_hooks.singularity = dict(type="mmbcn.SingularityHook", interval=1)
    runner = NormRunner.from_cfg(cfg)

    def fail(*args):
        raise RuntimeError("stop here")

    runner.model.decode_head.forward = fail
    with pytest.raises(RuntimeError, match="stop here"):
        runner.train()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
