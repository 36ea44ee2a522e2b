"""What mmcv, mmengine and mmseg do to norm layers must do the right thing to ours."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmbcn
from mmbcn import BCN, MicroBCN, SyncBCN
from mmbcn.layers import BatchChannelNorm

REPO = Path(mmbcn.__file__).parents[1]
LAYERS = [BCN, MicroBCN, SyncBCN]
needs_mm = pytest.mark.skipif(
    not all(map(mmbcn.norms.find_spec, ("mmengine", "mmcv", "mmseg"))), reason="needs mmseg"
)


def python(code, *args):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}"]
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def randomize(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
    return net


def small_net(cls=BCN):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), cls(6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    return randomize(net)


def image(n=2, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def resnet(depth=18, kind="BCN", training=True, **kwargs):
    from mmseg.models.backbones import ResNet

    torch.manual_seed(0)
    norm_cfg = dict(type=kind, num_groups="auto", requires_grad=True)
    net = ResNet(depth, stem_channels=8, base_channels=8, norm_cfg=norm_cfg, **kwargs)
    net.train(training)  # mmseg's returns nothing
    return net


def norms(net):
    return [m for m in net.modules() if isinstance(m, BatchChannelNorm)]


# --- registries ----------------------------------------------------------------------------------


@needs_mm
@pytest.mark.parametrize("cls", LAYERS)
def test_build_norm_layer(cls):
    from mmcv.cnn import build_norm_layer, is_norm

    for kind in (cls.__name__, f"mmbcn.{cls.__name__}", cls):
        cfg = dict(type=kind, num_groups=3, momentum=0.2, requires_grad=False)
        name, layer = build_norm_layer(cfg, 6, postfix=1)
        assert (name, type(layer)) == ("bn1", cls)
        assert (layer.num_groups, layer.momentum, layer.eps) == (3, 0.2, 1e-5)
        assert [p.requires_grad for p in layer.parameters()] == [False] * 4
    assert is_norm(layer)
    _, layer = build_norm_layer(dict(type=cls.__name__, num_groups=3, eps=1e-3), 6)
    assert (layer.eps, layer.bn.eps) == (1e-3, 1e-3)
    assert all(p.requires_grad for p in layer.parameters())


@needs_mm
def test_registries():
    from mmengine.registry import MODELS
    from mmseg.registry import MODELS as MMSEG_MODELS

    from mmbcn.registry import NORM_LAYERS

    for cls in LAYERS:
        assert NORM_LAYERS.get(cls.__name__) is cls
        assert MODELS.get(cls.__name__) is cls
        assert MMSEG_MODELS.get(cls.__name__) is cls
        layer = NORM_LAYERS.build(dict(type=cls.__name__, num_features=64))
        assert (type(layer), layer.num_features, layer.num_groups) == (cls, 64, 32)
        assert cls.__name__ in NORM_LAYERS.module_dict
    assert MODELS.get("WSConv2d") is mmbcn.WSConv2d
    assert "WSConv2d" not in NORM_LAYERS.module_dict


@needs_mm
def test_dotted_names_need_no_import():
    python(
        "from mmcv.cnn import build_conv_layer, build_norm_layer\n"
        "assert 'mmbcn' not in sys.modules\n"
        "name, layer = build_norm_layer(dict(type='mmbcn.BCN', num_groups='auto'), 48)\n"
        "assert (name, type(layer).__name__, layer.num_groups) == ('bn', 'BCN', 24)\n"
        "conv = build_conv_layer(dict(type='mmbcn.WSConv2d'), 3, 4, 3)\n"
        "assert type(conv).__name__ == 'WSConv2d'\n"
    )


# --- training and freezing -----------------------------------------------------------------------


@needs_mm
@pytest.mark.parametrize("kind", ["BCN", "MicroBCN"])
def test_norm_eval_freezes_the_statistics(kind):
    net = resnet(kind=kind, norm_eval=True)
    assert norms(net)
    assert not any(m.bn.training for m in norms(net))
    before = {k: v.clone() for k, v in net.named_buffers()}
    net(image())
    for key, value in net.named_buffers():
        assert torch.equal(value, before[key]), key
    net = resnet(kind=kind)
    net(image())
    assert all(int(m.bn.num_batches_tracked) == 1 for m in norms(net))


@needs_mm
def test_frozen_stages():
    net = resnet(frozen_stages=1)
    frozen = [net.bn1, *norms(net.layer1)]
    assert len(frozen) == 5
    for layer in norms(net):
        expected = layer not in frozen
        assert layer.bn.training is expected
        assert all(p.requires_grad is expected for p in layer.parameters())


@needs_mm
@pytest.mark.parametrize("cls", LAYERS)
def test_norm_decay_mult_reaches_all_four(cls):
    from mmengine.optim import build_optim_wrapper

    net = small_net(cls)
    cfg = dict(
        optimizer=dict(type="SGD", lr=0.1, weight_decay=0.5),
        paramwise_cfg=dict(norm_decay_mult=0.0),
    )
    wrapper = build_optim_wrapper(net, cfg)
    decay = {id(p): g["weight_decay"] for g in wrapper.param_groups for p in g["params"]}
    got = {name: decay[id(p)] for name, p in net.named_parameters()}
    assert got == {
        "0.weight": 0.5,
        **{f"1.{name}": 0.0 for name in ("weight", "bias", "bn.weight", "bn.bias")},
        **{"3.weight": 0.5, "3.bias": 0.5},
    }


@needs_mm
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("kind", ["BCN", "MicroBCN", "SyncBCN"])
def test_zero_init_residual_leaves_no_dead_block(depth, kind):
    net = resnet(depth, kind)
    net.init_weights()
    last = "bn2" if depth == 18 else "bn3"
    lasts = {n: m for n, m in net.named_modules() if n.endswith(f".{last}")}
    assert len(lasts) == (8 if depth == 18 else 16)
    for layer in norms(net):
        assert layer.bn.weight.eq(1).all()
        assert layer.weight.eq(0 if layer in lasts.values() else 1).all()
        assert not layer.bn.bias.any()
        assert not layer.bias.any()
    sum(y.square().mean() for y in net(image())).backward()
    for name, layer in lasts.items():
        assert layer.weight.grad.any(), name


@pytest.mark.parametrize("cls", LAYERS)
def test_apply_keeps_one_stage_alive_only_when_both_were_zeroed(cls):
    def zero(module):
        if getattr(module, "weight", None) is not None:
            nn.init.zeros_(module.weight)

    net = small_net(cls)
    net.apply(zero)
    assert not net[1].weight.any()
    assert net[1].bn.weight.eq(1).all()
    assert not net[0].weight.any()
    net[1].apply(lambda m: nn.init.constant_(m.weight, 0.5))
    assert net[1].weight.eq(0.5).all()
    assert net[1].bn.weight.eq(0.5).all()
    net = small_net(cls)
    nn.init.zeros_(net[1].weight)
    net.apply(lambda m: None)
    assert not net[1].weight.any()


@needs_mm
@pytest.mark.parametrize("kind", ["BCN", "MicroBCN"])
def test_with_cp_changes_nothing(kind):
    results = []
    for with_cp in (False, True):
        net = resnet(kind=kind, with_cp=with_cp).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            x = (image() + step).double().requires_grad_()
            sum(y.square().mean() for y in net(x)).backward()
            optimizer.step()
        results.append({**net.state_dict(), "dx": x.grad})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-9, atol=1e-9, msg=key)
    assert int(results[1]["bn1.bn.num_batches_tracked"]) == 2


# --- conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BCN, MicroBCN])
def test_convert_and_revert_sync_batchnorm(cls):
    net, x = small_net(cls).eval(), image(size=6)
    expected, state = net(x), copy.deepcopy(net.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(converted[1]) is cls
    assert type(converted[1].bn) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(x), expected)
    revert = pytest.importorskip("mmengine.model", exc_type=ImportError).revert_sync_batchnorm
    reverted = revert(converted)
    assert type(reverted[1]) is cls
    assert isinstance(reverted[1].bn, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(reverted[1].bn, nn.SyncBatchNorm)
    torch.testing.assert_close(reverted(x), expected)
    for key, value in reverted.state_dict().items():
        assert torch.equal(value, state[key]), key
    once, twice = small_net(cls).train(), reverted.train()
    torch.testing.assert_close(twice(x), once(x))
    torch.testing.assert_close(twice[1].bn.running_var, once[1].bn.running_var)


@needs_mm
def test_revert_sync_batchnorm_of_sync_bcn():
    from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm

    net, x = small_net(SyncBCN).eval(), image(size=6)
    expected = net(x)
    net = revert_sync_batchnorm(net)
    assert isinstance(net[1], SyncBCN)
    torch.testing.assert_close(net(x), expected)
    net = convert_sync_batchnorm(net).eval()  # mmengine's forgets the mode
    assert type(net[1].bn) is nn.SyncBatchNorm
    torch.testing.assert_close(net(x), expected)


@needs_mm
@pytest.mark.parametrize("kind", ["BCN", "MicroBCN", "SyncBCN"])
def test_fuse_conv_bn_leaves_the_function_alone(kind):
    from mmcv.cnn.utils import fuse_conv_bn

    net = resnet(kind=kind, training=False)
    for layer in norms(net):
        randomize(layer)
    expected = net(image())
    fused = fuse_conv_bn(net)
    assert len(norms(fused)) == 20
    for y, e in zip(fused(image()), expected, strict=True):
        torch.testing.assert_close(y, e)


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LAYERS)
def test_copies(cls, tmp_path):
    net, x = small_net(cls), image(size=6)
    net(x).sum().backward()
    net.eval()
    path = tmp_path / "net.pth"
    torch.save(net, path)
    copies = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(path, weights_only=False),
    ]
    for other in copies:
        torch.testing.assert_close(other(x), net(x))
        other.train()(x + 1)
        assert int(other[1].bn.num_batches_tracked) == 2
    assert int(net[1].bn.num_batches_tracked) == 1  # nothing is shared


@needs_mm
@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("cls", LAYERS)
def test_ema(cls, update_buffers):
    from mmengine.model import ExponentialMovingAverage

    net = small_net(cls)
    ema = ExponentialMovingAverage(net, momentum=0.25, update_buffers=update_buffers)
    start = copy.deepcopy(net.state_dict())
    ema.update_parameters(net)  # the first call copies
    randomize(net, seed=3)
    ema.update_parameters(net)
    averaged = ema.module.state_dict()
    for key, _ in net.named_parameters():
        expected = 0.75 * start[key] + 0.25 * net.state_dict()[key]
        torch.testing.assert_close(averaged[key], expected)
    running = net[1].bn.running_mean
    share = 0.25 if update_buffers else 1.0  # else copied: the statistics of some network
    expected = (1 - share) * start["1.bn.running_mean"] + share * running
    torch.testing.assert_close(averaged["1.bn.running_mean"], expected)
    assert ema.eval()(image(size=6)).isfinite().all()


@pytest.mark.parametrize("cls", LAYERS)
def test_moving_between_dtypes(cls):
    net, x = small_net(cls), image(size=6)
    net(x)
    net.double()
    y = net(x.double())
    assert y.dtype == torch.float64
    y.sum().backward()


# --- without the mm packages ---------------------------------------------------------------------

BLOCKED = """
for name in ('mmengine', 'mmcv', 'mmseg'):
    sys.modules[name] = None
import torch, mmbcn
from torch import nn
"""


def test_works_without_mm_packages():
    python(
        BLOCKED
        + """
layer = mmbcn.BCN(6, 3)
layer(torch.randn(2, 6, 4, 4)).sum().backward()
assert layer.bn.running_mean.any()
net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
mmbcn.convert_norm(net, 'microbcn_ws')
assert [type(m).__name__ for m in net] == ['WSConv2d', 'MicroBCN', 'ReLU', 'Conv2d']
net(torch.randn(1, 3, 6, 6)).sum().backward()
cfg = mmbcn.set_norm(dict(type='X', norm_cfg=dict(type='BN')), 'bcn')
assert cfg['norm_cfg']['type'] == 'mmbcn.BCN'
"""
    )


def test_what_needs_mm_packages_says_how_to_get_them():
    out = python(
        BLOCKED
        + """
for name in ('ShapesDataset', 'CamVidDataset', 'NormRunner'):
    try:
        getattr(mmbcn, name)
    except ImportError as error:
        for part in ("pip install 'mmbcn[onedl]'", 'pip install mmengine==0.10.7 mmcv==2.1.0'):
            assert part in str(error), (name, str(error))
        print(name)
    except AttributeError as error:
        print('AttributeError', error)
try:
    mmbcn.registry.NORM_LAYERS.get('BCN')
except ImportError as error:
    assert 'mmbcn[onedl]' in str(error)
    print('registry')
"""
    )
    assert out.split("\n")[:-1] == ["ShapesDataset", "CamVidDataset", "NormRunner", "registry"]


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = mmbcn.NoSuchThing
    assert {"BCN", "convert_norm", "NormRunner"} <= set(dir(mmbcn))


def test_eval_equals_grouped_batch_norm():
    """What all of the above keeps: F.group_norm with a per-group affine on the batch stage."""
    layer = randomize(BCN(6, 3)).eval()
    x = torch.randn(2, 6, 5, 5)
    y = F.group_norm(layer.bn(x), 3)
    y = y * layer.weight.repeat_interleave(2).view(1, 6, 1, 1)
    torch.testing.assert_close(layer(x), y + layer.bias.repeat_interleave(2).view(1, 6, 1, 1))
