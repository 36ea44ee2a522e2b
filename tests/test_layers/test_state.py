"""Checkpoints of other norms, and of the original code, load into the batch-channel norms."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbcn import BCN, MicroBCN, SyncBCN

LAYERS = [BCN, MicroBCN, SyncBCN]


def randomize(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
    return net


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn1 = norm(6)

    def forward(self, x):
        return self.bn1(self.conv(x))


def ours(cls=BCN, groups=3):
    return Net(lambda c: cls(c, num_groups=groups))


def assert_is_grouped_bn(net, bn_net, groups=3):
    """In eval, a BN network's weights give that network with a plain group norm behind."""
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = F.group_norm(bn_net.eval()(x), groups)
    torch.testing.assert_close(net.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert net.bn1.weight.eq(1).all()
    assert not net.bn1.bias.any()
    assert int(net.bn1.bn.num_batches_tracked) == int(bn_net.bn1.num_batches_tracked)


@pytest.mark.parametrize("groups", [3, 6], ids=["groups", "one_channel_each"])
@pytest.mark.parametrize("cls", LAYERS)
def test_batch_norm_checkpoint(cls, groups):
    bn_net = randomize(Net(nn.BatchNorm2d))
    bn_net.bn1.num_batches_tracked.fill_(7)
    state = bn_net.state_dict()
    names = list(state)
    net = randomize(ours(cls, groups), seed=2)
    nn.init.zeros_(net.bn1.weight)  # as init_weights() leaves a block's last norm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = net.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(state) == names  # the caller's dict is left alone
    assert_is_grouped_bn(net, bn_net, groups)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("cls", LAYERS)
def test_own_checkpoint(cls, groups):
    """Also where C == G, and a group affine has the shape of a per-channel one."""
    net, other = randomize(ours(cls, groups)), randomize(ours(cls, groups), seed=2)
    other.load_state_dict(net.state_dict())
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    layer = cls(6, groups)
    layer.load_state_dict(net.bn1.state_dict())  # no prefix
    assert torch.equal(layer.weight, net.bn1.weight)
    assert torch.equal(layer.bn.running_mean, net.bn1.bn.running_mean)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("stage", ["bn", "pbn"])
@pytest.mark.parametrize("groups", [3, 6])
def test_original_code(cls, stage, groups):
    expected = randomize(ours(cls, groups)).state_dict()
    state = {}
    for key, value in expected.items():
        if key in ("bn1.weight", "bn1.bias"):
            value = value.reshape(1, groups, 1)
        state[key.replace("bn1.bn.", f"bn1.{stage}.")] = value
    state[f"bn1.{stage}.estbn_moving_speed"] = torch.zeros(1)
    net = randomize(ours(cls, groups), seed=2)
    net.load_state_dict(state, strict=True)
    for key, value in net.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_group_norm_checkpoint():
    gn_net = randomize(Net(lambda c: nn.GroupNorm(3, c)))
    net = randomize(ours(), seed=2)
    statistics = net.bn1.bn.running_mean.clone()
    with pytest.warns(UserWarning, match="not the same function"):
        net.load_state_dict(gn_net.state_dict(), strict=True)
    assert torch.equal(net.bn1.bn.weight, gn_net.bn1.weight)
    assert torch.equal(net.bn1.bn.bias, gn_net.bn1.bias)
    assert net.bn1.weight.eq(1).all()
    assert not net.bn1.bias.any()
    assert torch.equal(net.bn1.bn.running_mean, statistics)


def test_missing_and_wrong_entries_are_reported():
    state = randomize(Net(nn.BatchNorm2d)).state_dict()
    del state["bn1.running_var"]
    with pytest.raises(RuntimeError, match=r"bn1\.bn\.running_var"):
        ours().load_state_dict(state)
    state = {k: v for k, v in state.items() if k.startswith("conv")}
    with pytest.raises(RuntimeError, match=r"bn1\.bn\.running_mean"):
        ours().load_state_dict(state)
    result = ours().load_state_dict(state, strict=False)
    assert set(result.missing_keys) >= {f"bn1.{name}" for name, _ in BCN(6, 3).named_parameters()}
    narrow = Net(nn.BatchNorm2d)
    narrow.bn1 = nn.BatchNorm2d(4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours().load_state_dict(narrow.state_dict())


def test_own_state_with_missing_group_affine_is_reported():
    state = ours().state_dict()
    del state["bn1.weight"]
    with pytest.raises(RuntimeError, match=r"bn1\.weight"):
        ours().load_state_dict(state)


# --- through mmengine ----------------------------------------------------------------------------


@pytest.fixture
def runner():
    return pytest.importorskip("mmengine.runner", exc_type=ImportError)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["bn", "original"])
def test_mmengine_load_checkpoint(runner, tmp_path, prefix, kind):
    bn_net, net = randomize(Net(nn.BatchNorm2d)), randomize(ours(), seed=2)
    state = bn_net.state_dict()
    if kind == "original":
        expected = randomize(ours(), seed=3).state_dict()
        state = {k.replace(".bn.", ".pbn."): v for k, v in expected.items()}
        for key in ("bn1.weight", "bn1.bias"):
            state[key] = state[key].reshape(1, 3, 1)
        state["bn1.pbn.estbn_moving_speed"] = torch.zeros(1)
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {prefix + k: v for k, v in state.items()}, "meta": {}}, path)
    runner.load_checkpoint(net, str(path), map_location="cpu", strict=True)
    if kind == "bn":
        assert_is_grouped_bn(net, bn_net)
    else:
        for key, value in net.state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_mmengine_load_state_dict(runner):
    bn_net, net = randomize(Net(nn.BatchNorm2d)), randomize(ours(), seed=2)
    runner.load_state_dict(net, copy.copy(bn_net.state_dict()), strict=True)
    assert_is_grouped_bn(net, bn_net)


@pytest.mark.parametrize("kind", ["BCN", "MicroBCN"])
def test_resnet(runner, tmp_path, kind):
    backbones = pytest.importorskip("mmseg.models.backbones", exc_type=ImportError)

    def resnet(norm_cfg):
        return backbones.ResNet(18, stem_channels=8, base_channels=8, norm_cfg=norm_cfg)

    bn_net = randomize(resnet(dict(type="BN")))
    net = resnet(dict(type=kind, num_groups=4))
    path = str(tmp_path / "resnet.pth")
    torch.save(bn_net.state_dict(), path)
    net.init_weights()
    runner.load_checkpoint(net, path, map_location="cpu", strict=True)
    for name, module in bn_net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layer = net.get_submodule(name)
            assert layer.weight.eq(1).all(), name  # some were zero after init_weights
            for key, value in module.state_dict().items():
                assert torch.equal(layer.bn.state_dict()[key], value), (name, key)
