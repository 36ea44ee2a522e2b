"""ENorm while training: after steps that happened, before anything else sees the weights."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS, DefaultScope
from mmseg.registry import MODELS

from mmbcn import set_norm
from mmbcn.analysis.borrowed import evaluating
from mmbcn.analysis.equalize import segmentor_equalizer
from mmbcn.analysis.segmentor import run_heads
from mmbcn.engine import ENormHook
from mmbcn.equalization import Equalizer
from mmbcn.errors import UsageError

HOOK = dict(type="mmbcn.ENormHook", c=1.1)


def sgd(**options):
    optimizer = dict(_delete_=True, type="SGD", lr=0.01, momentum=0.9)  # merging takes keys out
    return dict(optimizer=optimizer, **options)


@pytest.fixture
def cycles(monkeypatch):
    """The optimizers that cycles were called with."""
    calls = []
    cycle = Equalizer.cycle

    def counted(self, optimizer=None):
        calls.append(optimizer)
        cycle(self, optimizer)

    monkeypatch.setattr(Equalizer, "cycle", counted)
    return calls


class Watch(Hook):
    """Calls a function after each iteration, before any other hook."""

    priority = 0

    def __init__(self, look):
        self.look = look

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.look(runner)


def trained(cfg, look=lambda runner: None):
    runner = RUNNERS.build(cfg)
    runner.register_hook(Watch(look))
    runner.train()
    return runner


def test_step_is_followed_by_one_cycle(tiny_config, cycles):
    plain = trained(tiny_config("none", iters=1, optim_wrapper=sgd())).model
    expected = copy.deepcopy(plain)
    segmentor_equalizer(expected, 1.1).cycle()
    cycles.clear()
    runner = trained(tiny_config("none", iters=1, optim_wrapper=sgd(), custom_hooks=[HOOK]))
    assert cycles == [runner.optim_wrapper.optimizer]
    for one, two in zip(runner.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    batch = dict(inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8)])
    with evaluating(plain), evaluating(runner.model):
        outputs = zip(run_heads(runner.model, batch), run_heads(plain, batch), strict=True)
    for one, two in outputs:
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()
    moved = [
        not torch.equal(p, q)
        for p, q in zip(plain.parameters(), expected.parameters(), strict=True)
    ]
    assert sum(moved) > 40


def test_accumulated_gradients_are_left_alone(tiny_config, cycles):
    """Steps come after the 2nd, 4th and 5th iteration; the cycle comes before all hooks."""
    seen = []
    optim = sgd(accumulative_counts=2)
    cfg = tiny_config("none", iters=5, optim_wrapper=optim, custom_hooks=[HOOK])
    runner = trained(cfg, lambda runner: seen.append(len(cycles)))
    assert seen == [0, 1, 1, 2, 3]
    runner.optim_wrapper.optimizer.step()
    assert len(cycles) == 3, "the training is over"


def test_averaged_and_saved_weights_are_balanced(tiny_config, tmp_path):
    ema = dict(type="EMAHook", momentum=0.5)  # the first time, it copies
    checkpoint = dict(_delete_=True, type="CheckpointHook", by_epoch=False, interval=1)
    runner = trained(
        tiny_config(
            "none",
            iters=1,
            optim_wrapper=sgd(),
            custom_hooks=[ema, HOOK],
            default_hooks=dict(checkpoint=checkpoint),
        )
    )
    saved = torch.load(tmp_path / "work/iter_1.pth", weights_only=False)
    key = "backbone.layer1.0.conv1.weight"
    for state in (saved["state_dict"], {k[7:]: v for k, v in saved["ema_state_dict"].items()}):
        torch.testing.assert_close(state[key], runner.model.state_dict()[key])


def model_of(cfg):
    set_norm(cfg.model, "none")
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_loss_scaling_skips_are_left_alone(tiny_config, cycles, fused):
    model = model_of(tiny_config())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=fused)
    runner = SimpleNamespace(
        model=model, optim_wrapper=OptimWrapper(optimizer), logger=logging.getLogger("enorm")
    )
    hook = ENormHook()
    hook.before_train(runner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    batch = dict(inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8)])
    for steps in (0, 1):
        before = [p.clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = sum(out.square().sum() for out in run_heads(model, batch))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert len(cycles) == steps
        same = all(map(torch.equal, before, model.parameters()))
        assert same == (steps == 0)
    hook.after_train(runner)


def test_other_optimizers_are_refused_before_the_first_step(tiny_config, cycles):
    optim = dict(optimizer=dict(_delete_=True, type="RMSprop", lr=0.01))
    cfg = tiny_config("none", optim_wrapper=optim, custom_hooks=[HOOK])
    with pytest.raises(UsageError, match=r"RMSprop.* use SGD, Adam or AdamW"):
        trained(cfg)
    assert not cycles


def test_norms_are_refused_by_name(tiny_config):
    with pytest.raises(UsageError, match=r"backbone\.stem\.1 \(BatchNorm2d\), .*norm 'none'"):
        RUNNERS.build(tiny_config("bn", custom_hooks=[HOOK])).train()


def test_norms_can_be_ignored(tiny_config, cycles):
    cfg = tiny_config("bn", iters=2, custom_hooks=[dict(HOOK, ignore_norms=True)])
    trained(cfg)
    assert len(cycles) == 2
