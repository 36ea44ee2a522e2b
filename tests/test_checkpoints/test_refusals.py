"""What does not fit is refused in words that say what to do, or loaded where that is asked for."""

import argparse

import pytest
import torch

pytest.importorskip("mmseg")
from loading import (
    assert_same_stages,
    backbone_cfg,
    initialized,
    load_from,
    model_cfg,
    pretrained,
)
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmbcn.checkpoints.fit import fit_checkpoint
from mmbcn.checkpoints.guard import state_mismatch
from mmbcn.checkpoints.loader import load_options
from mmbcn.errors import UsageError
from mmbcn.layers import AutoGroupNorm, NoNorm

ASK = r"--allow-partial \(allow_partial=True in a config\)"


def share(net, *starts):
    """Of the parameters of a published backbone, those that begin so."""
    sizes = {k: p.numel() for k, p in net.named_parameters() if not k.startswith("fc.")}
    return sum(v for k, v in sizes.items() if k.startswith(starts)) / sum(sizes.values())


def without(net, *starts):
    return {k: v for k, v in net.state_dict().items() if not k.startswith(starts)}


@pytest.mark.parametrize("lost", ["layer2.0.bn1.", "layer2.0.bn1.running_mean", "bn1."])
@pytest.mark.parametrize("door", ["load_from", "init_cfg"])
def test_norm_layer_missing(lost, door, published, save, tmp_path):
    net = published("bn_18")
    assert share(net, lost) < 0.01
    path = save(without(net, lost))
    layer = lost.replace("running_mean", "").removesuffix(".")

    def load(allow_partial):
        if door == "load_from":
            return load_from(model_cfg("bn"), path, tmp_path, allow_partial=allow_partial).backbone
        with load_options(dict(allow_partial=allow_partial)):
            return initialized(backbone_cfg("bn", init_cfg=pretrained(path)))

    where = rf"(backbone\.)?{layer}"
    with pytest.raises(UsageError, match=rf"1 norm layer not matched \({where}\)\. .*{ASK}"):
        load(allow_partial=False)
    backbone = load(allow_partial=True)
    name = "layer1.0.conv1.weight"
    assert torch.equal(backbone.state_dict()[name], net.state_dict()[name])


def test_more_than_one_percent_of_the_backbone_missing(published, save, tmp_path):
    net = published("bn_18")
    large, small = "layer4.1.conv2.weight", "layer1.0.conv1.weight"
    assert share(net, small) < 0.01 < share(net, large)
    load_from(model_cfg("bn"), save(without(net, small)), tmp_path)
    with pytest.raises(UsageError, match=rf"{share(net, large):.1%} of the backbone's") as error:
        load_from(model_cfg("bn"), save(without(net, large)), tmp_path)
    assert f"missing     1: backbone.{large}" in str(error.value)


@pytest.mark.parametrize("norm", ["bn", "bcn_ws"])
def test_the_limit_is_one_percent(norm, published, save, tmp_path):
    """Rows of the backbone's largest filter, so that the share is just below and just above."""
    net = published("bn_18" if norm == "bn" else "bcn_18")
    layers = ["layer1.0.conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv1.weight"]
    assert share(net, *layers[:2]) < 0.01  # of every size there is, the nearest to the limit
    assert 0.0095 < share(net, *layers) < 0.01
    load_from(model_cfg(norm), save(without(net, *layers)), tmp_path)
    layers.append("conv1.weight")
    assert 0.01 < share(net, *layers) < 0.011
    with pytest.raises(UsageError, match=r"1\.\d% of the backbone's parameters not matched"):
        load_from(model_cfg(norm), save(without(net, *layers)), tmp_path)


def test_deeper_backbone_in_the_checkpoint(published, save, tmp_path):
    state = published("bn_18").state_dict()
    state |= {k.replace("4.1.", "4.2."): v for k, v in state.items() if k.startswith("layer4.1.")}
    with pytest.raises(UsageError, match=r"backbone's parameters not matched.*another depth"):
        load_from(model_cfg("bn"), save(state), tmp_path)


def test_shape_mismatch(published, save, tmp_path):
    state = dict(published("bn_18").state_dict())
    key = "layer4.0.downsample.0.weight"
    state[key] = state[key][:, :200]
    with pytest.raises(UsageError, match=r"1\.2% of the backbone's parameters") as error:
        load_from(model_cfg("bn"), save(state), tmp_path)
    line = rf"other shape 1: backbone.{key} (512, 200, 1, 1), model (512, 256, 1, 1)"
    assert line in str(error.value)
    load_from(model_cfg("bn"), save(state), tmp_path, allow_partial=True)


def test_other_number_of_classes(save, tmp_path):
    """Starts a training, is no test of the same model."""
    state = initialized(model_cfg("bn", classes=19)).state_dict()
    path = save({"state_dict": state})
    model = load_from(model_cfg("bn", classes=11), path, tmp_path)
    key = "decode_head.convs.0.conv.weight"
    assert torch.equal(model.state_dict()[key], state[key])
    with pytest.raises(UsageError, match=r"2 entries not matched \(decode_head\.conv_seg\.weight"):
        load_from(model_cfg("bn", classes=11), path, tmp_path, testing=True)


def test_backbone_only_is_no_model_to_test(published, save, tmp_path):
    path = save(published("bn_18").state_dict())
    with pytest.raises(UsageError, match=r"a backbone only: start a training from it \(load_from"):
        load_from(model_cfg("bn"), path, tmp_path, testing=True)


@pytest.mark.parametrize(("other", "name"), [("bn", "BatchNorm"), ("gn", "GroupNorm")])
def test_no_norm_is_named_in_models_and_checkpoints(other, name, save, tmp_path):
    states = {norm: initialized(model_cfg(norm)).state_dict() for norm in ("none", other)}
    kinds = {"none": "NoNorm", other: name}
    for ours, theirs in (("none", other), (other, "none")):
        text = f"a {kinds[ours]} in the model and {kinds[theirs]} in the checkpoint"
        with pytest.raises(UsageError, match=text):
            load_from(model_cfg(ours), save(states[theirs]), tmp_path, testing=True)
        with pytest.raises(UsageError, match=r"norm layers not matched \(.*--allow-partial"):
            load_from(model_cfg(ours), save(states[theirs]), tmp_path)
    load_from(model_cfg("none"), save(states["none"]), tmp_path, testing=True)


def test_norms_of_one_channel_are_those_of_the_model():
    """A single weight may be GroupNorm's or NoNorm's."""
    for layer in (AutoGroupNorm(1), NoNorm(1)):
        model = nn.Sequential(layer)
        assert state_mismatch(model, model.state_dict()) is None


def test_auxiliary_head_may_be_missing_in_a_test(save, tmp_path):
    state = initialized(model_cfg("bn")).state_dict()
    kept = {k: v for k, v in state.items() if not k.startswith("auxiliary_head.")}
    load_from(model_cfg("bn"), save(kept), tmp_path, testing=True)
    kept = {k: v for k, v in state.items() if k != "decode_head.conv_seg.bias"}
    with pytest.raises(UsageError, match=r"1 entry not matched \(decode_head\.conv_seg\.bias\)"):
        load_from(model_cfg("bn"), save(kept), tmp_path, testing=True)


@pytest.mark.parametrize(
    ("kind", "backbone", "hint"),
    [("bn_deep_18", "ResNet", "ResNetV1c"), ("bn_18", "ResNetV1c", "ResNet")],
)
def test_other_stem(kind, backbone, hint, published, save):
    path = save(published(kind).state_dict())
    with pytest.raises(UsageError, match=rf"model\.backbone\.type={hint}\. "):
        initialized(backbone_cfg("bn", kind=backbone, init_cfg=pretrained(path)))


def test_heads_that_are_absent_are_not_blamed(published, save, tmp_path):
    path = save(published("bn_deep_18").state_dict())
    with pytest.raises(UsageError, match=r": 2 norm layers not matched \(backbone\.conv1\.1, ba"):
        load_from(model_cfg("bn"), path, tmp_path)


def test_group_stage_is_never_dropped(published, save, tmp_path):
    path = save(published("bcn_18").state_dict())
    with pytest.raises(UsageError, match=r"of another norm than the config: .*or the same --norm"):
        load_from(model_cfg("bn"), path, tmp_path)


@pytest.mark.parametrize(
    ("kind", "norm", "lost"),
    [
        ("bn_18", "bn", "layer2.0.bn1.running_mean"),
        ("bcn_18", "bcn_ws", "layer2.0.bn1.pbn.weight"),
    ],
)
def test_part_of_a_norm_layer_is_no_other_norm(kind, norm, lost, published, save, tmp_path):
    path = save(without(published(kind), lost))
    with pytest.raises(UsageError, match=r"1 norm layer not matched \(backbone\.layer2\.0\.bn1\)"):
        load_from(model_cfg(norm), path, tmp_path, testing=True)


def test_nothing_of_the_model(save, tmp_path):
    path = save({"state_dict": {"encoder.weight": torch.ones(3)}})
    with pytest.raises(UsageError, match="nothing in it belongs to this model"):
        load_from(model_cfg("bn"), path, tmp_path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {}}, {}])
def test_no_weights(content, save, tmp_path):
    with pytest.raises(UsageError, match=r"holds no weights: expected a state dict"):
        load_from(model_cfg("bn"), save(content), tmp_path)


def test_resume_needs_more_than_weights(published, save, tmp_path):
    path = save(published("bn_18").state_dict())
    with pytest.raises(
        UsageError, match=r"a run cannot be resumed from .*: it has no meta, .*optimizer"
    ):
        load_from(model_cfg("bn"), path, tmp_path, resume=True)


@pytest.mark.parametrize("door", ["load_from", "init_cfg"])
def test_trust_pickle(door, published, save, tmp_path):
    net = published("bcn_18")
    path = save({"state_dict": net.state_dict(), "args": argparse.Namespace(lr=0.1)})
    cfg = model_cfg("bcn_ws")

    def load(trust_pickle):
        if door == "load_from":
            return load_from(cfg, path, tmp_path, trust_pickle=trust_pickle)
        cfg["backbone"]["init_cfg"] = pretrained(path)
        with load_options(dict(trust_pickle=trust_pickle)):
            return initialized(cfg)

    with pytest.raises(UsageError, match=r"holds argparse\.Namespace, .*: --trust-pickle \(trust_"):
        load(trust_pickle=False)
    assert_same_stages(load(trust_pickle=True).backbone, net)


def test_options_hold_inside_only(save):
    """Mmengine's own door reads safely as well, also after a run that trusted a file failed."""
    path = save({"w": torch.ones(1), "args": argparse.Namespace(lr=0.1)})
    for _ in range(2):
        with pytest.raises(UsageError, match="--trust-pickle"):
            CheckpointLoader.load_checkpoint(path)
        with pytest.raises(KeyError), load_options(dict(trust_pickle=True, allow_partial=True)):
            raise KeyError(CheckpointLoader.load_checkpoint(path)["w"])


def test_report(published):
    """All kinds of lines in one."""
    state = without(published("bcn_18"), "layer1.0.conv1.weight")
    state["layer1.0.conv2.weight"] = torch.zeros(64, 32, 3, 3)
    model = initialized(model_cfg("bcn_ws"))
    _, report = fit_checkpoint(model, {"state_dict": state, "x": 1}, "x.pth")
    entries = sum(k.startswith("backbone.") for k in model.state_dict())
    expected = [
        "checkpoint x.pth -> EncoderDecoder",
        f"  matched     {entries - 2} entries, with 20 norm layers",
        "  converted   put under backbone. (161)",
        "  converted   pbn -> bn, group affine (1, G, 1) -> (G,) (20)",
        "  left out    2: backbone.fc.weight, backbone.fc.bias",
        "  not in it   decode_head: keeps its initial weights",
        "  not in it   auxiliary_head: keeps its initial weights",
        "  missing     1: backbone.layer1.0.conv1.weight",
        "  other shape 1: backbone.layer1.0.conv2.weight (64, 32, 3, 3), model (64, 64, 3, 3)",
    ]
    assert report.text().splitlines() == expected
