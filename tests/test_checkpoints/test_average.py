"""Averages of checkpoints against closed forms."""

import pytest
import torch
from torch import nn

from mmbcn import BCN
from mmbcn.checkpoints.average import average_checkpoints
from mmbcn.errors import UsageError


def named(*states, **meta):
    return [
        (f"{i}.pth", {"state_dict": s, "meta": {"iter": i, **meta}}) for i, s in enumerate(states)
    ]


def model_cfg(norm):
    return f'model = dict(norm_cfg=dict(type="{norm}"))'


def test_mean_in_float64():
    """In float32, the first one would be lost in 1e8 + 1."""
    values = (1e8, 1.0, -1e8, 1.0)
    states = [{"w": torch.tensor([v]), "n": torch.tensor(k)} for k, v in enumerate(values)]
    result = average_checkpoints(named(*states))
    assert torch.equal(result["state_dict"]["w"], torch.tensor([0.5]))
    assert result["state_dict"]["n"] == 3  # counters are not averaged
    assert result["meta"] == {"iter": 3, "averaged": ["0.pth", "1.pth", "2.pth", "3.pth"]}
    assert [float(s["w"]) for s in states] == list(values)  # as they were


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    states = [{"w": torch.full((2, 3), v, dtype=dtype)} for v in (6e4, 5e4)]
    w = average_checkpoints(named(*states))["state_dict"]["w"]
    assert w.dtype == dtype
    expected = (states[0]["w"].double() + states[1]["w"].double()) / 2  # beyond float16's range
    assert torch.equal(w, expected.to(dtype))


def test_a_flat_state_dict_is_taken_too():
    result = average_checkpoints([("a", {"w": torch.zeros(1)}), ("b", {"w": torch.ones(1)})])
    assert result["state_dict"]["w"] == 0.5
    assert result["meta"] == {"averaged": ["a", "b"]}


def test_ema_weights_stand_under_state_dict():
    one = {"state_dict": {"w": torch.ones(1)}, "ema_state_dict": {"module.w": torch.zeros(1)}}
    result = average_checkpoints([("a", one)], ema=True)
    assert result["state_dict"] == {"w": 1}
    assert "ema_state_dict" not in result


W, V = torch.ones(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("checkpoints", "ema", "message"),
    [
        (named({"w": W}), False, "at least two checkpoints, got 1; or one with --ema"),
        (named({"w": W}), True, r"0.pth holds no EMA weights.*'ema_state_dict'"),
        (named({"w": W, "v": V}, {"w": W}), False, "1.pth is of another model.*it lacks v$"),
        (named({"w": W}, {"w": W, "v": V}), False, "1.pth is of another model.*it also has v$"),
        (
            named({"w": W}, {"w": V}),
            False,
            r"1.pth is of another model than 0.pth: of another form: "
            r"w \(float32 \(2,\) and float32 \(3,\)\)",
        ),
        (named({"w": W}, {"w": W.long()}), False, "of another form: w .float32 .* and int64"),
        (
            named({"w": W}, {"w": W * torch.nan}),
            False,
            "1.pth has non-finite values in w: leave it out",
        ),
        (
            [*named({"w": W}, cfg=model_cfg("BN")), *named({"w": W}, cfg=model_cfg("GN"))],
            False,
            "was trained with GroupNorm, .* with BatchNorm: their average means nothing",
        ),
    ],
)
def test_mistakes_say_what_to_do(checkpoints, ema, message):
    with pytest.raises(UsageError, match=message):
        average_checkpoints(checkpoints, ema)


def test_tool_without_a_config_warns_of_the_statistics(tool, save, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"bn": BCN(4, 2)})
    files = []
    for value in (1.0, 3.0):
        nn.init.constant_(model["bn"].bn.weight, value)
        files.append(save({"state_dict": model.state_dict()}, f"{value}.pth"))
    out = tmp_path / "new" / "avg.pth"
    code, text = tool("average", *files, "--out", out)
    assert code == 0
    assert "warning: the running statistics are averages too" in text
    state = torch.load(out, weights_only=True)["state_dict"]
    assert state["bn.bn.weight"].eq(2).all()
    code, text = tool("average", files[0], "--out", tmp_path / "no.pth")
    assert code == 1
    assert "error: averaging needs at least two" in text
    assert not (tmp_path / "no.pth").exists()


def test_tool_says_where_weights_were_averaged_already(tool, save, tmp_path):
    file = save({"state_dict": {"w": W}, "ema_state_dict": {}})
    _, text = tool("average", file, file, "--out", tmp_path / "a.pth")
    assert "was saved by EMAHook: the weights in it are averaged already" in text
    assert "warning" not in text  # no statistics
    code, text = tool("average", file, "--ema", "--out", tmp_path / "a.pth")
    assert code == 0
    assert "note" not in text
