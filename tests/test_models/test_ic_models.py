"""Networks with IC layers: what runs right before each convolution, traced while they run."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")

from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from mmbcn import convert_norm, set_norm
from mmbcn.errors import UsageError
from mmbcn.layers import IC
from mmbcn.models import ICFCNHead, ICResNet
from mmbcn.models.ic_units import UNITS

HEAD = dict(norm_cfg=dict(type="BN"), num_classes=3, dropout_ratio=0.3)
JOINS = ("AddBackward0", "CatBackward0", "MeanBackward1", "MaxPool2DWithIndicesBackward0")
JOINS += ("UpsampleBilinear2DBackward0", "AvgPool2DBackward0")


def config(backbone="ResNetV1c", head="ASPPHead", depth=18, **options):
    width = 8 * (4 if depth == 50 else 1)
    return dict(
        type="EncoderDecoder",
        backbone=dict(
            type=backbone, depth=depth, stem_channels=8, base_channels=8, strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4), norm_cfg=dict(type="BN"), **options,
        ),
        decode_head=dict(type=head, in_channels=8 * width, in_index=3, channels=6, **HEAD),
        auxiliary_head=dict(
            type="FCNHead", in_channels=4 * width, in_index=2, channels=6, num_convs=2,
            concat_input=True, **HEAD,
        ),
    )  # fmt: skip


def build(cfg, unit=None):
    cfg = set_norm(cfg, "ic")
    if unit:
        for part in (cfg["backbone"], cfg["decode_head"], cfg["auxiliary_head"]):
            part["unit"] = unit
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(cfg).double().train()


def run(model, x):
    features = model.extract_feat(x)
    return [features, model.decode_head(features), model.auxiliary_head(features)]


class Watch:
    """The steps of autograd that lead to convolutions and to IC layers, and from IC layers."""

    def __init__(self, model):
        self.to_conv, self.to_ic, self.from_ic = {}, {}, set()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(self.note(self.to_conv, name))
            elif isinstance(module, IC):
                module.register_forward_pre_hook(self.note(self.to_ic, name))
                module.register_forward_hook(lambda m, i, out: self.from_ic.add(out.grad_fn))

    @staticmethod
    def note(places, name):
        return lambda module, inputs: places.update({name: inputs[0].grad_fn})


def sources(step, ends):
    """Where the walk back through joins ends."""
    if step in ends or step.name() not in JOINS:
        return {step}
    return set().union(*(sources(s, ends) for s, _ in step.next_functions if s is not None))


MODELS_TO_WATCH = [
    config(),
    config("ResNet", "FCNHead", 50),
    config("ResNetV1d", "mmbcn.PointwiseFuseASPPHead"),
]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("cfg", MODELS_TO_WATCH, ids=lambda cfg: cfg["backbone"]["type"])
def test_every_convolution_follows_an_ic_layer(cfg, unit):
    model = build(copy.deepcopy(cfg), unit)
    watch = Watch(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features, *_ = run(model, x)
    first = watch.to_conv.pop("backbone.stem.0")
    assert first is None, "the image itself"
    assert len(watch.to_conv) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - 1
    for name, step in watch.to_conv.items():
        if unit == "conv-relu-ic":  # sums, concatenation and pooling of IC layers' outputs
            assert sources(step, watch.from_ic) <= watch.from_ic, name
        else:
            assert step in watch.from_ic, name
    behind_relu = {n for n, s in watch.to_ic.items() if s.name() == "ReluBackward0"}
    expected = {
        "relu-ic-conv": watch.to_ic.keys(),
        "ic-conv-relu": {n for n in watch.to_ic if n.endswith((".ic2", ".ic3", "stem.5"))},
        "conv-relu-ic": {n for n in watch.to_ic if "downsample" not in n},
    }[unit]
    assert behind_relu >= expected
    assert unit == "ic-conv-relu" or behind_relu == expected
    if unit == "relu-ic-conv":
        assert all(f.min() < 0 for f in features), "raw sums"


def test_blocks_are_what_they_say():
    """Blocks by hand, without dropout."""
    torch.manual_seed(0)
    model = ICResNet(18, base_channels=4, stem_channels=4, norm_cfg=dict(type="IC", drop_rate=0.0))
    model.double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def bn(x):
        mean = x.mean((0, 2, 3), keepdim=True)
        return (x - mean) / ((x - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()

    def conv(layer, x):
        return torch.conv2d(x, layer.weight, None, layer.stride, layer.padding)

    def unit(layer, x):
        return conv(layer, bn(x.relu()))

    def branch(block):
        return unit(block.conv2, unit(block.conv1, x))

    same, other = model.layer1[0], model.layer2[0]
    torch.testing.assert_close(same(x), branch(same) + x)
    torch.testing.assert_close(other(x), branch(other) + unit(other.downsample[2], x))


def test_recomputation_changes_nothing():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for options in ({}, dict(with_cp=True)):
        model = build(config(**options))
        torch.manual_seed(1)
        loss = sum(out.square().mean() for out in run(model, x)[1:])
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_stages_freeze():
    model = build(config("ResNet", frozen_stages=1))
    still = {n for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert still == {
        n for n, _ in model.backbone.named_parameters() if n.startswith(("stem", "layer1"))
    }


def test_unknown_units_and_options_are_refused():
    with pytest.raises(UsageError, match="unknown unit 'conv-ic-relu'; known are relu-ic-conv"):
        ICResNet(18, unit="conv-ic-relu")
    with pytest.raises(UsageError, match="unknown unit"):
        ICFCNHead(unit="bn", in_channels=4, channels=4, num_classes=2)
    with pytest.raises(UsageError, match="ICResNet has no plugins"):
        ICResNet(50, plugins=[dict(cfg=dict(type="ContextBlock"), position="after_conv3")])


# --- the switch ----------------------------------------------------------------------------------


def test_switch_changes_types_and_back():
    cfg = config("mmseg.ResNetV1c")
    original = copy.deepcopy(cfg)
    set_norm(cfg, "ic")
    assert cfg["backbone"]["type"] == "mmbcn.ICResNetV1c"
    assert cfg["decode_head"]["type"] == "mmbcn.ICASPPHead"
    assert cfg["auxiliary_head"]["type"] == "mmbcn.ICFCNHead"
    once = copy.deepcopy(cfg)
    assert set_norm(cfg, "ic") == once
    set_norm(cfg, "bn")
    for part in ("backbone", "decode_head", "auxiliary_head"):
        kind = cfg[part].pop("type").removeprefix("mmseg.")
        assert kind == original[part].pop("type").removeprefix("mmseg.")
        assert cfg[part] == {**original[part], "norm_cfg": dict(type="BN", requires_grad=True)}


@pytest.mark.parametrize("head", ["UPerHead", "mmdet.FCNHead"])
def test_switch_refuses_what_has_no_counterpart(head):
    cfg = config(head=head)
    before = copy.deepcopy(cfg)
    with pytest.raises(UsageError, match=r"There is none for model\.decode_head, a (UPer|FCN)Head"):
        set_norm(cfg, "ic")
    assert cfg == before


def test_built_models_are_refused():
    with pytest.raises(UsageError, match="convert_norm cannot give a built model IC layers"):
        convert_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "ic")
