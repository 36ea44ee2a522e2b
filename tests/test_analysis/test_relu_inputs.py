"""Which norms a ReLU follows, against lists written by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmbcn import BCN, MicroBCN, convert_norm
from mmbcn.analysis import ReluInputs


class Net(nn.Module):
    """Convolution, norm, ``act``."""

    def __init__(self, act, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = norm or nn.BatchNorm2d(8)
        self.act = act

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def watch(model, x=None, run=None):
    """What was observed, as (name, copy of the values), and the followers."""
    seen = []
    watched = ReluInputs(model, lambda name, layer, v: seen.append((name, v.clone())))
    x = torch.randn(2, 3, 9, 7) if x is None else x
    with watched:
        (model if run is None else run)(x)
    return seen, watched.followers


RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "functional in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp positional": lambda x: torch.clamp(x, 0),
    "clamp in place": lambda x: x.clamp_(min=0.0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "ReLU6": nn.ReLU6(),
    "ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "clamp to 6": lambda x: x.clamp(0, 6),
    "threshold": nn.Threshold(0, 0),
    "through identity": nn.Sequential(nn.Identity(), nn.ReLU()),
    "through dropout in eval": nn.Sequential(nn.Dropout(0.5).eval(), nn.ReLU()),
    "through a cast": lambda x: x.double().relu(),
    "through a copy": lambda x: x.clone().relu_(),
    "through detach": lambda x: x.detach().relu(),
    "and elsewhere": lambda x: x.relu() + x,
}
OTHERS = {
    "leaky": (nn.LeakyReLU(), "leaky_relu"),
    "gelu": (nn.GELU(), "gelu"),
    "hardtanh": (nn.Hardtanh(), "hardtanh"),
    "clamp elsewhere": (lambda x: x.clamp(min=0.1), "clamp"),
    "clamp from above": (lambda x: x.clamp(max=0), "clamp"),
    "threshold elsewhere": (nn.Threshold(0.1, 0), "threshold"),
    "add before": (lambda x: (x + 1).relu(), "add"),
    "add in place before": (lambda x: x.add_(1).relu(), "add"),
    "pooling before": (lambda x: F.max_pool2d(x, 2).relu(), "max_pool2d_with_indices"),
    "another shape": (lambda x: x.flatten(2).relu(), "view"),
    "classifier": (nn.Conv2d(8, 2, 1), "convolution"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("act", RELUS.values(), ids=RELUS)
def test_relu_of_any_spelling(act, grad):
    model, x = Net(act), torch.randn(2, 3, 9, 7)
    model.norm.bias.data.uniform_(-1, 1)
    with torch.set_grad_enabled(grad):
        seen, followers = watch(model, x)
    assert "relu" in followers["norm"]
    [(name, values)] = seen
    assert name == "norm"
    expected = F.batch_norm(
        model.conv(x), None, None, model.norm.weight, model.norm.bias, training=True
    )
    torch.testing.assert_close(values.float(), expected)  # before it was overwritten
    assert not values.requires_grad


@pytest.mark.parametrize(("act", "follower"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_relu(act, follower):
    seen, followers = watch(Net(act))
    assert not seen
    assert followers == {"norm": {follower}}


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(8).eval(),
        nn.GroupNorm(4, 8),
        nn.InstanceNorm2d(8),
        nn.LayerNorm(5),
        BCN(8, 4),
        MicroBCN(8, 4),
    ],
)
def test_norms_of_any_kind(norm):
    seen, _ = watch(Net(F.relu, norm))
    assert [name for name, _ in seen] == ["norm"]


class Residual(nn.Module):
    """As torchvision's: one activation for both places, used twice, and a learned shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.unused = nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def test_residual_sum_is_not_normalized():
    """The sum in place is the very tensor that bn2 returned, with other values."""
    seen, followers = watch(Residual())
    assert [name for name, _ in seen] == ["bn1"]
    assert followers == {"bn1": {"relu"}, "bn2": {"add"}, "downsample.1": {"add"}}


def test_activation_inside_of_the_norm():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x), inplace=True)

    model, x = Net(nn.Conv2d(8, 2, 1), NormAct(8)), torch.randn(2, 3, 9, 7)
    [(name, values)], followers = watch(model, x)
    assert name == "norm"
    assert followers == {"norm": {"relu"}}
    expected = F.batch_norm(model.conv(x), None, None, training=True)
    torch.testing.assert_close(values, expected)


def test_what_a_norm_does_inside_is_not_its_output():
    """Kalman normalization predicts through a ReLU and a convolution of its own, while training."""
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3)]
    torch.manual_seed(0)
    model = convert_norm(nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(inplace=True)), "kn")
    outputs = {}
    for name in ("1", "4"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda m, i, y, name=name: outputs.update({name: y.clone()}))
    seen, followers = watch(model.train())
    assert model[4].link is not None  # it did predict
    assert [name for name, _ in seen] == ["1", "4"]
    for name, values in seen:
        torch.testing.assert_close(values, outputs[name], rtol=0, atol=0)
    assert followers == {"1": {"relu"}, "4": {"relu"}}


def test_layer_that_runs_several_times():
    class Shared(Net):
        def forward(self, x):
            a, b = self.norm(self.conv(x)), self.norm(self.conv(x))
            return F.relu(b) + F.relu(a) + self.norm(self.conv(x))

    seen, followers = watch(Shared(None))
    assert [name for name, _ in seen] == ["norm", "norm"]
    assert followers == {"norm": {"relu", "add"}}


def test_outputs_are_told_apart_when_memory_is_reused():
    """A tensor at the place of one that is gone is not taken for it."""

    def act(x):
        del x
        return [torch.randn(2, 8, 7, 5).relu() for _ in range(50)]

    class Dropping(Net):
        def forward(self, x):
            self.norm(self.conv(x))
            return act(None)

    seen, _ = watch(Dropping(None))
    assert not seen


@pytest.mark.parametrize("mode", ["plain", "autocast", "checkpoint"])
def test_training_is_not_changed(mode):
    """Gradients, statistics and the output are bit by bit those without watching."""

    def step(watched):
        torch.manual_seed(0)
        model = nn.Sequential(
            Net(nn.ReLU(inplace=True), BCN(8, 4)), nn.Conv2d(8, 3, 1), Net(F.relu)
        )
        x, seen = torch.randn(2, 3, 9, 7, requires_grad=True), []
        watch = ReluInputs(model, lambda name, layer, v: seen.append((name, v.dtype)))
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            if watched:
                watch.__enter__()
            y = checkpoint(model, x, use_reentrant=False) if mode == "checkpoint" else model(x)
            if watched:
                watch.__exit__(None, None, None)
        y.float().square().sum().backward()
        dtype = torch.bfloat16 if mode == "autocast" else torch.float32
        assert seen == ([("0.norm", dtype), ("2.norm", dtype)] if watched else [])
        return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    for a, b in zip(step(True), step(False), strict=True):
        assert torch.equal(a, b)


def test_nothing_stays_behind():
    def fail(x):
        raise RuntimeError("stop")

    model = Net(fail)
    with pytest.raises(RuntimeError, match="stop"):
        watch(model)
    assert not model.norm._forward_hooks
    assert not model.norm._forward_pre_hooks
    model.act = F.relu
    assert [name for name, _ in watch(model)[0]] == ["norm"]
    seen = []
    with ReluInputs(model, lambda *_: seen.append(1)):
        pass
    model(torch.randn(1, 3, 9, 7))
    assert not seen


STEM = ["stem.1", "stem.4", "stem.7"]
ASPP = ["image_pool.1.bn", *(f"aspp_modules.{i}.bn" for i in range(4)), "bottleneck.bn"]


@pytest.mark.parametrize("norm", ["BN", "BCN"])
@pytest.mark.parametrize(
    ("depth", "sizes", "inside", "last", "downsample"),
    [
        (18, (2, 2, 2, 2), ["bn1"], "bn2", (2, 3, 4)),
        (50, (3, 4, 6, 3), ["bn1", "bn2"], "bn3", (1, 2, 3, 4)),
    ],
)
def test_resnet_and_aspp_of_mmseg(depth, sizes, inside, last, downsample, norm):
    pytest.importorskip("mmseg")
    from mmseg.models import ASPPHead, ResNetV1c

    norm_cfg = dict(type=norm, num_groups="auto") if norm == "BCN" else dict(type=norm)
    backbone = ResNetV1c(depth=depth, stem_channels=8, base_channels=8, norm_cfg=norm_cfg)
    head = ASPPHead(
        in_channels=8 * (8 if depth == 18 else 32), channels=8, num_classes=3, norm_cfg=norm_cfg
    )
    model = nn.ModuleDict(dict(backbone=backbone, head=head))
    seen, followers = watch(
        model, torch.randn(2, 3, 64, 64), lambda x: head([None] * 3 + [backbone(x)[-1]])
    )
    blocks = [(i, j) for i, size in enumerate(sizes, 1) for j in range(size)]
    relus = [f"backbone.{name}" for name in STEM]
    relus += [f"backbone.layer{i}.{j}.{name}" for i, j in blocks for name in inside]
    relus += [f"head.{name}" for name in ASPP]
    sums = [f"backbone.layer{i}.{j}.{last}" for i, j in blocks]
    sums += [f"backbone.layer{i}.0.downsample.1" for i in downsample]
    assert [name for name, _ in seen] == relus
    assert followers == {**{n: {"relu"} for n in relus}, **{n: {"add"} for n in sums}}
