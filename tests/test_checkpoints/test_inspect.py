"""What inspect.py shows of checkpoints with known content."""

import re

import pytest
import torch
from torch import nn

from mmbcn import BCN, MicroBCN
from mmbcn.checkpoints.inspect import config_layers, differences, entries, norm_kinds

CFG = """
conv_cfg = dict(type="NotThis")
model = dict(
    backbone=dict(norm_cfg=dict(type="mmbcn.BCN", num_groups=4), conv_cfg=dict(type="WSConv2d")),
    decode_head=dict(norm_cfg=dict(type="SyncBN")),
)
"""


def rows(out):
    """The cells of the printed tables' rows."""
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]


def updated(model):
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.fill_(2.0)
    return model


@pytest.mark.parametrize(
    ("layer", "kinds"),
    [
        (nn.BatchNorm2d(8), {"BatchNorm": 1}),
        (BCN(8, 4), {"batch-channel norm, 4 groups": 1}),
        (MicroBCN(8, 2), {"batch-channel norm, 2 groups": 1}),
        (nn.GroupNorm(2, 8), {"GroupNorm or alike (per sample)": 1}),
        (nn.Conv2d(2, 2, 1), {}),
        (nn.Linear(2, 1), {}),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {"BatchNorm": 1}),
    ],
)
def test_norm_kinds(layer, kinds):
    assert norm_kinds(nn.ModuleDict({"n": layer}).state_dict()) == kinds
    if not isinstance(layer, nn.Sequential):
        assert norm_kinds(layer.state_dict()) == kinds  # at the root, names have no dot


def test_norms_that_a_mm_conv_module_calls_bn():
    model = nn.ModuleDict({"bn": nn.BatchNorm2d(4), "head": nn.ModuleDict({"bn": BCN(4, 2)})})
    assert norm_kinds(model.state_dict()) == {"BatchNorm": 1, "batch-channel norm, 2 groups": 1}


def test_a_convolution_that_holds_its_batch_norm():
    conv = nn.Conv2d(2, 4, 3)
    conv.bn = nn.BatchNorm2d(4)
    assert norm_kinds(nn.ModuleDict({"conv": conv}).state_dict()) == {"BatchNorm": 1}


def test_types_in_the_config():
    assert config_layers(CFG) == "SyncBN and mmbcn.BCN, convolutions WSConv2d"
    assert config_layers("model = (") == "unknown"


def test_values_and_faults():
    state = {
        "w": torch.tensor([[1.0, 3.0], [1.0, 3.0]]),
        "bad": torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]),
        "n.running_mean": torch.zeros(3),
        "n.running_var": torch.ones(3),
        "m.running_mean": torch.zeros(3),
        "m.running_var": torch.tensor([0.0, -1.0, 2.0]),
        "none": torch.zeros(0, 2),
        "steps": torch.tensor(7),
    }
    found = {e.key: e for e in entries(state)}
    w = found["w"]
    assert (w.dtype, w.shape, w.numel, w.mean, w.std, w.faults) == ("float32", "2x2", 4, 2, 1, [])
    assert found["bad"].faults == ["3 of 4 non-finite"]
    assert found["n.running_var"].faults == ["statistics never updated"]
    assert found["m.running_var"].faults == ["1 of 3 variances zero", "1 of 3 variances negative"]
    assert (found["none"].shape, found["none"].mean) == ("0x2", 0)
    assert (found["steps"].shape, found["steps"].mean) == ("()", 7)


def test_differences():
    a = {"same": torch.ones(2), "nan": torch.tensor([torch.nan, 1.0]), "x": torch.tensor([3.0, 4])}
    b = {**a, "x": torch.tensor([3.0, 9]), "nan": a["nan"].clone()}
    a |= {"gone": torch.ones(1), "shape": torch.ones(2, 3), "half": torch.ones(1).half()}
    b |= {"new": torch.ones(1), "shape": torch.ones(3, 2), "half": torch.ones(1)}
    changed, others = differences(a, b)
    assert changed == [("x", 5.0, 1.0)]
    assert others == [
        "gone: only in the first",
        "shape: 2x3 and 3x2",
        "half: float16 and float32",
        "new: only in the second",
    ]
    assert differences({"x": torch.zeros(1)}, {"x": torch.ones(1)})[0] == [("x", 1.0, torch.inf)]
    [change], _ = differences({"x": torch.ones(2)}, {"x": torch.tensor([torch.nan, 1.0])})
    assert change.largest != change.largest


def test_table_of_a_checkpoint(tool, save):
    model = updated(nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "norm": BCN(8, 4)}))
    meta = dict(iter=12, cfg=CFG, dataset_meta=dict(classes=("road", "sky")), averaged=["a", "b"])
    meta["mmengine_version"] = "0.10.12" + "90cdac6cf2" * 4
    path = save({"meta": meta, "state_dict": model.state_dict(), "optimizer": {}})
    code, out = tool("inspect", path)
    assert code == 0
    cells = rows(out)
    for row in (
        ["holds", "meta, state_dict, optimizer"],
        ["tensors", "9 (8 float32, 1 int64)"],
        ["parameters", str(3 * 8 * 9 + 8 + 2 * 8 + 2 * 4)],
        ["norms by entries", "1 batch-channel norm, 4 groups"],
        ["norms by config", "SyncBN and mmbcn.BCN, convolutions WSConv2d"],
        ["classes", "2: road, sky"],
        ["iter", "12"],
        ["mmengine_version", "0.10.12, commit 90cdac6"],
        ["averaged", "a, b"],
        ["norm.bn.running_var", "float32", "8", "8", "2", "0", ""],
    ):
        assert row in cells
    assert [r[2] for r in cells if r[0] == "conv.weight"] == ["8x3x3x3"]
    assert "9 entries, 265 values" in out
    code, out = tool("inspect", path, "--filter", r"running")
    assert "2 entries, 16 values" in out


def test_faults_are_listed_even_if_filtered_out_and_end_with_1(tool, save):
    state = updated(nn.ModuleDict({"bn": nn.BatchNorm2d(2)})).state_dict()
    state["bn.weight"][1] = torch.nan
    code, out = tool("inspect", save(state), "--filter", "bias")
    assert code == 1
    assert re.search(r"faults:\n  .*checkpoint.pth: bn.weight: 1 of 2 non-finite", out)
    assert ["holds", "a state dict"] in rows(out)


def test_table_of_differences(tool, save):
    state = {"w": torch.ones(2), "v": torch.ones(2), "u": torch.ones(1)}
    first = save({"state_dict": state, "meta": {"cfg": "lr = 1\nwd = 2\n"}}, "a.pth")
    state = {**state, "w": torch.tensor([1.0, 2.0]), "v": torch.tensor([1.0, 9.0])}
    second = save({"state_dict": state, "meta": {"cfg": "lr = 3\nwd = 2\n"}}, "b.pth")
    code, out = tool("inspect", first, second)
    assert code == 0
    assert rows(out)[-2:] == [["v", "8", "5.657"], ["w", "1", "0.7071"]]  # largest first
    assert "2 entries differ in value, 1 are equal" in out
    assert "-lr = 1\n+lr = 3" in out
    assert "wd" not in out


def test_mistakes_say_what_to_do(tool, save, tmp_path):
    path = save({"w": torch.ones(1)})
    for args, message in (
        ((path, "--filter", "("), "--filter '(' is no regular expression"),
        ((path, "--filter", "x"), "no entry matches --filter 'x'"),
        ((tmp_path / "none.pth",), "there is no checkpoint"),
        ((save({"a": 1}, "empty.pth"),), "empty.pth"),
    ):
        code, out = tool("inspect", *args)
        assert code == 1
        assert "error: " in out
        assert message in out


class Dangerous:
    """A class that reading by weights only refuses."""


def test_more_than_data_needs_trust(tool, save):
    path = save({"state_dict": {"w": torch.ones(1)}, "more": Dangerous()})
    code, out = tool("inspect", path)
    assert code == 1
    assert "--trust-pickle" in out
    assert tool("inspect", path, "--trust-pickle")[0] == 0
