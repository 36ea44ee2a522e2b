"""Faults are injected; the message must name the iteration, the image, the module and the norm."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.registry import RUNNERS

from mmbcn.engine import NonFiniteHook
from mmbcn.errors import UsageError

ROOT = Path(__file__).parents[2]


def build(cfg, before=None):
    """A runner that calls ``before`` before each iteration."""
    from mmengine.hooks import Hook

    class Tamper(Hook):
        priority = "VERY_HIGH"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if before:
                before(runner, batch_idx, data_batch)

    runner = RUNNERS.build(cfg)
    runner.register_hook(Tamper())
    return runner


def message(cfg, before=None):
    runner = build(cfg, before)
    with pytest.raises(UsageError) as caught:
        runner.train()
    return str(caught.value)


def spoil_image(at, sample=1):
    def before(runner, batch_idx, data_batch):
        if batch_idx in at:
            data_batch["inputs"][sample] = data_batch["inputs"][sample].float()
            data_batch["inputs"][sample][0, 3, 3] = torch.nan

    return before


def test_it_is_on_in_the_shipped_runtime(tiny_config):
    runner = build(tiny_config())
    assert [h.action for h in runner.hooks if isinstance(h, NonFiniteHook)] == ["stop"]


@pytest.mark.parametrize("norm", ["bcn", "microbcn", "bn", "gn"])
def test_infinite_weight(tiny_config, norm):
    def before(runner, batch_idx, data_batch):
        if batch_idx == 2:
            runner.model.backbone.layer3[1].conv2.weight.data[0, 0, 0, 0] = torch.inf

    text = message(tiny_config(norm), before)
    assert "the loss of iteration 3 is not finite: nan" in text
    assert "terms: decode.loss_ce, aux.loss_ce" in text
    assert "not finite: backbone.layer3.1.conv2 (Conv2d)" in text
    kind = dict(bcn="BCN", microbcn="MicroBCN", bn="BatchNorm2d", gn="AutoGroupNorm")[norm]
    name = "gn1" if norm == "gn" else "bn1"
    assert f"norm layer before it: backbone.layer3.1.{name} ({kind}), outputs up to" in text
    assert "1 are not finite, the first is backbone.layer3.1.conv2.weight" in text
    assert len(re.findall(r"shapes://0/48x48/\d+_image.png", text)) == 2
    assert "NOT FINITE" not in text
    assert "start from a checkpoint" in text


@pytest.mark.parametrize("norm", ["bcn", "microbcn"])
def test_image_that_is_not_finite(tiny_config, norm):
    text = message(tiny_config(norm), spoil_image([1]))
    assert "the loss of iteration 2" in text
    assert "not finite: backbone.stem.0 (Conv2d)" in text
    assert "norm layer before it: none" in text
    marked = re.search(r"images: (\S+) \(NOT FINITE\), (\S+)\n", text)
    assert marked
    assert marked[1] != marked[2]
    assert "weights: all finite" in text
    assert "data_preprocessor" in text


def test_learning_rate_far_too_high(tiny_config):
    cfg = tiny_config()
    cfg.optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e30))
    cfg.param_scheduler = []
    text = message(cfg)
    assert "the loss of iteration 2" in text
    assert "learning rate 1e+30" in text
    assert re.search(r"up to \d\.\d+e\+(2|3)\d \(\w+\.", text)
    assert "lower the learning rate" in text
    option = re.search(r"clip gradients \((\S+)=(\d+)\)", text)
    cfg = tiny_config(iters=1, **{option[1]: int(option[2])})  # as --cfg-options does
    RUNNERS.build(cfg).train()


def test_the_faulty_step_does_not_reach_the_weights_and_the_second_pass_moves_no_statistics(
    tiny_config,
):
    before = spoil_image([1])
    states = []

    def spy(runner, batch_idx, data_batch):
        states.append(copy.deepcopy(runner.model.state_dict()))
        before(runner, batch_idx, data_batch)

    runner = build(tiny_config(), spy)
    with pytest.raises(UsageError):
        runner.train()
    now = runner.model.state_dict()
    for name, _ in runner.model.named_parameters():
        assert torch.equal(now[name], states[1][name]), name
    assert int(now["backbone.stem.1.bn.num_batches_tracked"]) == 2


@pytest.mark.parametrize("norm", ["bcn", "microbcn", "bn"])
def test_skipping_is_as_if_the_batch_had_not_been(tiny_config, norm):
    def run(skip):
        cfg = tiny_config(norm, iters=4)
        cfg.custom_hooks = [dict(type="mmbcn.NonFiniteHook", action="skip")]
        cfg.param_scheduler = []
        cfg.model.decode_head.dropout_ratio = cfg.model.auxiliary_head.dropout_ratio = 0
        batches = []

        def before(runner, batch_idx, data_batch):
            batches.append(copy.deepcopy(data_batch))
            if batch_idx == 2:
                if skip:
                    spoil_image([2])(runner, batch_idx, data_batch)
                else:  # leave it out by taking the next batch right away
                    runner.optim_wrapper.update_params = lambda loss: None
                    saved.extend(b.clone() for b in runner.model.buffers())
            elif batch_idx == 3 and not skip:
                del runner.optim_wrapper.update_params
                for buffer, value in zip(runner.model.buffers(), saved, strict=True):
                    buffer.copy_(value)

        saved = []
        runner = build(cfg, before)
        runner.train()
        return runner.model.state_dict()

    left_out, skipped = run(False), run(True)
    for key, value in left_out.items():
        assert torch.equal(skipped[key], value), key


def test_skipping_stops_at_the_tenth_time_in_a_row(tiny_config):
    cfg = tiny_config(iters=30)
    cfg.custom_hooks = [dict(type="mmbcn.NonFiniteHook", action="skip")]
    bad = [*range(1, 10), *range(12, 30)]
    assert "the loss of iteration 22 is" in message(cfg, spoil_image(bad))


def test_an_overflow_that_loss_scaling_skips_is_no_error(tiny_config):
    """The gradients overflow, the scaler skips the step and halves the scale; the loss is fine."""
    from mmengine.optim import OptimWrapper

    runner = build(tiny_config(iters=3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scales = []

    class Scaled(OptimWrapper):
        def backward(self, loss, **kwargs):
            scaler.scale(loss).backward(**kwargs)
            self._inner_count += 1

        def step(self, **kwargs):
            scaler.step(self.optimizer, **kwargs)
            scaler.update()
            scales.append(scaler.get_scale())

    runner.optim_wrapper = Scaled(torch.optim.SGD(runner.model.parameters(), 1e-3))
    runner.train()
    assert scales[0] == 2.0**126


def test_under_autocast_and_gradient_accumulation(tiny_config):
    cfg = tiny_config(iters=4)
    cfg.optim_wrapper.update(type="mmbcn.BFloat16OptimWrapper", accumulative_counts=2)
    assert "the loss of iteration 4" in message(cfg, spoil_image([3]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_cause_that_does_not_come_again(tiny_config, value):
    from mmseg.models.losses import CrossEntropyLoss

    calls = []

    def once(module, args, output):
        calls.append(module)
        return output * (value if len(calls) == 3 else 1)

    runner = build(tiny_config())
    loss = runner.model.decode_head.loss_decode
    assert isinstance(loss, CrossEntropyLoss)
    loss.register_forward_hook(once)
    with pytest.raises(UsageError, match="none, in a second pass"):
        runner.train()


def test_unknown_action():
    with pytest.raises(UsageError, match="'stop' or 'skip', got 'ignore'"):
        NonFiniteHook("ignore")


SPOIL = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SpoilRank(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and batch_idx == 1:
            data_batch["inputs"][0] = torch.full(data_batch["inputs"][0].shape, torch.nan)
"""


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bcn", "syncbcn"])
def test_all_ranks_stop_together(tiny_config, tmp_path, norm):
    """One rank's loss is not finite; SyncBCN's second pass exchanges, so all must take part."""
    (tmp_path / "spoil.py").write_text(SPOIL)
    cfg = tiny_config()
    cfg.pop("norm")
    cfg.custom_imports = dict(imports=["spoil"])
    cfg.custom_hooks.append(dict(type="SpoilRank"))
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_dict()))
    env = dict(
        os.environ,
        PYTHON=sys.executable,
        PORT="29641",
        OMP_NUM_THREADS="1",
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )
    command = ["bash", "tools/dist_train.sh", tmp_path / "config.json", "2", "--norm", norm]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert "error: the loss of iteration 2 is not finite: nan" in text
    assert "(NOT FINITE)" in text
    if norm == "bcn":
        assert "is not finite on another rank; here: " in text
