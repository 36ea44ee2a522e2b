"""What people switch on in training, for 50 steps on the embedded set, against the plain run.

The runs share weights, data order and optimizer (no dropout), so that what the switch should not
change can be compared step by step, and what it rounds differently within a stated tolerance.
"""

import copy
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from test_bad_input import Door

from mmbcn.layers import BatchChannelNorm

STEPS = 50
NORMS = ["bcn", "microbcn", "bcn_ws"]


class Recorder(Hook):
    """The loss of every step, and the state after it; changes the run before the first."""

    priority = "VERY_HIGH"

    def __init__(self, change, states):
        self.losses, self.states, self.change, self.keep = [], [], change, states

    def before_train(self, runner):
        self.change(runner)  # the weights have been initialized

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs["loss"]))
        if self.keep:
            self.states.append(copy.deepcopy(runner.model.state_dict()))


class Run:
    def __init__(self, cfg, change=lambda runner: None, states=False):
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.dropout_ratio = 0
        self.runner = RUNNERS.build(cfg)
        recorder = Recorder(change, states)
        self.runner.register_hook(recorder)
        self.runner.train()
        self.losses, self.states = torch.tensor(recorder.losses), recorder.states
        self.model = self.runner.model
        assert self.losses.isfinite().all()

    def last(self):
        return self.losses[-10:].mean().item()


@pytest.fixture
def plain(tiny_config):
    """The plain run of a norm, made once; its config, to be changed, is `config`."""
    return lambda norm, iters=STEPS: _plain(norm, iters, tiny_config)


_KNOWN = {}


def config(tiny_config, norm, iters=STEPS):
    cfg = tiny_config(norm, iters=iters, size=48, batch=4, width=8)
    cfg.param_scheduler = []
    return cfg


def _plain(norm, iters, tiny_config):
    if (norm, iters) not in _KNOWN:
        _KNOWN[norm, iters] = Run(config(tiny_config, norm, iters))
    return _KNOWN[norm, iters]


def differences(run, plain):
    """Relative difference of the losses, step by step."""
    return (run.losses - plain.losses).abs() / plain.losses


def batch_channel_norms(model):
    return [m for m in model.modules() if isinstance(m, BatchChannelNorm)]


def assert_trained(run, plain, tolerance):
    """The loss has fallen as it does in the plain run, and the statistics have been kept."""
    assert plain.last() < 0.8 * plain.losses[0]
    assert run.last() == pytest.approx(plain.last(), rel=tolerance)
    for layer, other in zip(*map(batch_channel_norms, (run.model, plain.model)), strict=True):
        assert layer.bn.num_batches_tracked == other.bn.num_batches_tracked
        assert layer.bn.running_var.dtype == layer.weight.dtype == torch.float32
        assert layer.bn.running_mean.isfinite().all()
        assert (layer.bn.running_var > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_backends_train_alike(tiny_config, monkeypatch, norm):
    """In float64: float32 runs drift apart by the tenth step, whatever rounds differently."""
    runs = []
    for backend in ("reference", "aten"):
        monkeypatch.setenv("MMBCN_BACKEND", backend)
        runs.append(Run(config(tiny_config, norm, 20), lambda runner: runner.model.double()))
    assert batch_channel_norms(runs[0].model)[0].bn.running_mean.dtype == torch.float64
    assert differences(*runs).max() < 1e-9
    assert runs[0].losses[-1] < runs[0].losses[0]


# --- mixed precision -----------------------------------------------------------------------------


class Float16(OptimWrapper):
    """mmengine's AmpOptimWrapper, for CPUs: float16 and loss scaling."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        self.skipped = 0

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast("cpu", torch.float16):
            yield

    def backward(self, loss, **kwargs):
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        before = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < before


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16(plain, tiny_config, norm):
    cfg = config(tiny_config, norm)
    cfg.optim_wrapper.type = "mmbcn.BFloat16OptimWrapper"
    kinds = set()

    def watch(runner):
        for layer in batch_channel_norms(runner.model):
            layer.register_forward_hook(lambda m, args, y: kinds.add((args[0].dtype, y.dtype)))

    run = Run(cfg, watch)
    assert (torch.bfloat16, torch.bfloat16) in kinds
    assert_trained(run, plain(norm), 0.1)
    assert differences(run, plain(norm))[0] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_float16_with_loss_scaling(plain, tiny_config, norm):
    def change(runner):
        optimizer = torch.optim.AdamW(runner.model.parameters(), lr=2e-3, weight_decay=0.01)
        runner.optim_wrapper = Float16(optimizer)

    run = Run(config(tiny_config, norm), change)
    wrapper = run.runner.optim_wrapper
    assert 0 < wrapper.skipped < STEPS  # the scale begins too high; the hook takes it as no error
    assert_trained(run, plain(norm), 0.3)  # the skipped steps are missing
    assert differences(run, plain(norm))[0] < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, --amp is mmengine's")
def test_amp_of_the_tool_is_bfloat16_on_a_cpu(tmp_path, tiny_config, monkeypatch):
    seen = set()
    forward = BatchChannelNorm.forward

    def watched(layer, x):
        seen.add(x.dtype)
        return forward(layer, x)

    monkeypatch.setattr(BatchChannelNorm, "forward", watched)
    Door(tmp_path, tiny_config, monkeypatch).train("--amp", iters=1)
    assert torch.bfloat16 in seen


# --- gradient clipping ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bcn", "microbcn"])
def test_gradient_clipping(plain, tiny_config, norm):
    def sgd(max_norm):
        cfg = config(tiny_config, norm)
        optimizer = dict(type="SGD", lr=0.05)
        cfg.optim_wrapper = dict(type="OptimWrapper", optimizer=optimizer)
        if max_norm:
            cfg.optim_wrapper.clip_grad = dict(max_norm=max_norm)
        return Run(cfg, states=True)

    free, loose, tight = sgd(None), sgd(1e9), sgd(0.1)
    assert torch.equal(free.losses, loose.losses)
    names = [name for name, _ in tight.model.named_parameters()]
    moved = [
        sum((b[n] - a[n]).double().square().sum() for n in names).sqrt()
        for a, b in zip(tight.states[:-1], tight.states[1:], strict=True)
    ]
    assert max(moved) <= 0.05 * 0.1 * (1 + 1e-4)
    assert min(moved) > 0.05 * 0.1 * 0.5  # so clipped, not stopped
    assert tight.last() < tight.losses[0]


# --- weights' EMA --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bcn", "microbcn"])
def test_ema_with_buffers(plain, tiny_config, norm):
    cfg = config(tiny_config, norm)
    cfg.custom_hooks = [dict(type="EMAHook", momentum=0.1, update_buffers=True)]
    run = Run(cfg, states=True)
    hook = next(h for h in run.runner.hooks if isinstance(h, EMAHook))
    assert torch.equal(run.losses, plain(norm).losses)  # it only watches
    averaged = hook.ema_model.module.state_dict()
    for key, value in averaged.items():
        if value.is_floating_point():
            expected = run.states[0][key].double()
            for state in run.states[1:]:
                expected = 0.9 * expected + 0.1 * state[key].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    counts = {int(v) for k, v in averaged.items() if k.endswith("num_batches_tracked")}
    assert counts == {1}  # integers are not averaged: as docs/reliability.md warns
    averaged_model = hook.ema_model.module.eval()
    images = torch.randn(2, 3, 48, 48)
    assert averaged_model(images, mode="tensor").isfinite().all()
    checkpoint = dict(state_dict=copy.deepcopy(run.model.state_dict()))
    hook.before_save_checkpoint(run.runner, checkpoint)
    resumed = checkpoint["ema_state_dict"]  # what training goes on with
    assert int(resumed["module.backbone.stem.1.bn.num_batches_tracked"]) == STEPS


# --- activation checkpointing --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_activation_checkpointing(plain, tiny_config, norm):
    cfg = config(tiny_config, norm)
    cfg.model.backbone.with_cp = True
    calls = []

    def count(runner):
        runner.model.backbone.layer2[1].conv1.register_forward_hook(lambda *_: calls.append(1))

    run = Run(cfg, count)
    assert len(calls) == 2 * STEPS  # it does recompute
    assert_trained(run, plain(norm), 0.02)
    assert differences(run, plain(norm))[:5].max() < 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_activation_checkpointing_of_one_step(tiny_config, norm):
    """The gradients of a whole model, and the statistics, are those of the plain step."""
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    from mmbcn import set_norm

    cfg = config(tiny_config, norm)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for with_cp in (False, True):
        cfg.model.backbone.with_cp = with_cp
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope("mmseg"):
            model = MODELS.build(set_norm(copy.deepcopy(cfg.model), norm)).double()
        model.init_weights()
        model.decode_head.dropout = None
        model.train()
        model(x, mode="tensor").square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({**grads, **dict(model.named_buffers())})
    first, second = results
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert int(second["backbone.layer1.0.bn1.bn.num_batches_tracked"]) == 1


# --- torch.compile, channels_last ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bcn", "microbcn"])
def test_compiled_model(plain, tiny_config, norm):
    """Backbone and heads without a graph break; aot_eager, as inductor's C++ takes minutes here."""

    def change(runner):
        for part in ("backbone", "decode_head", "auxiliary_head"):
            module = getattr(runner.model, part)
            module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)

    torch._dynamo.reset()
    run = Run(config(tiny_config, norm), change)
    assert_trained(run, plain(norm), 0.02)
    assert differences(run, plain(norm))[:5].max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_channels_last(plain, tiny_config, norm):
    seen = set()

    def change(runner):
        runner.model.to(memory_format=torch.channels_last)
        for layer in batch_channel_norms(runner.model):
            layer.register_forward_hook(
                lambda m, args, y: seen.add(
                    (args[0].shape[2] > 1)
                    and y.is_contiguous(memory_format=torch.channels_last)
                    and not y.is_contiguous()
                )
            )

    run = Run(config(tiny_config, norm), change)
    assert True in seen
    assert_trained(run, plain(norm), 0.02)
    assert differences(run, plain(norm))[:5].max() < 1e-3
