"""Published checkpoints: what is in them, their names, and who can read them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmbcn import BCN
from mmbcn.checkpoints.publish import publish
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.errors import UsageError


def checkpoint():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BCN(8, 4))
    state = model.state_dict()
    state["0.weight"] = state["0.weight"].to(memory_format=torch.channels_last)
    state["0.bias"] = torch.arange(100.0)[:8]  # a view into a larger storage
    state["half"] = torch.tensor([0.1]).half()
    palette = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    return {
        "meta": dict(
            cfg="model = dict()",
            iter=np.int64(20),
            dataset_meta=dict(classes=("a", "b"), palette=palette),
            seed=3,
            experiment_name="secret",
            time="20260101",
            hook_msgs=dict(best_ckpt="/home/me/best.pth"),
        ),
        "state_dict": state,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
        "message_hub": dict(log=1),
        "param_schedulers": [],
    }


def assert_equal_states(got, expected):
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value), key


def test_content(tmp_path):
    given = checkpoint()
    path = publish(given, "it", tmp_path / "new" / "bcn.pth")
    content = torch.load(path, weights_only=True)
    assert list(content) == ["meta", "state_dict"]
    assert content["meta"] == dict(
        cfg="model = dict()",
        iter=20,
        dataset_meta=dict(classes=("a", "b"), palette=[[1, 2, 3], [4, 5, 6]]),
    )
    assert_equal_states(content["state_dict"], given["state_dict"])
    assert all(
        v.untyped_storage().nbytes() == v.nbytes and v.is_contiguous()
        for v in content["state_dict"].values()
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"bcn-{digest[:8]}.pth"
    assert list(path.parent.iterdir()) == [path]
    assert "optimizer" in given


def test_any_reader_of_plain_torch_can_load_it(tmp_path):
    """With nothing of mmengine or mmbcn imported."""
    path = publish(checkpoint(), "it", tmp_path / "bcn.pth")
    code = (
        "import sys, torch; c = torch.load(sys.argv[1], weights_only=True);"
        "assert not {'mmengine', 'mmbcn'} & set(sys.modules);"
        "print(c['meta']['iter'], len(c['state_dict']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["20", "10"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_same_content_gives_the_same_file(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    names = [publish(checkpoint(), "it", tmp_path / d / f"bcn{suffix}").name for d in "abcdefgh"]
    assert len(set(names)) == 1
    other = checkpoint()
    other["state_dict"]["1.bn.bias"][0] += 1e-6
    assert publish(other, "it", tmp_path / f"bcn{suffix}").name != names[0]
    assert len(list(tmp_path.glob("*.*"))) == 1


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    given = checkpoint()
    path = publish(given, "it", tmp_path / "bcn.safetensors")
    with safetensors.safe_open(path, "pt") as file:  # by the library, whatever we wrote ourselves
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert state.keys() == given["state_dict"].keys()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that values are aligned
    assert_equal_states({k: state[k] for k in given["state_dict"]}, given["state_dict"])
    meta = read_checkpoint(path)["meta"]
    assert meta["iter"] == 20
    assert meta["dataset_meta"]["classes"] == ["a", "b"]


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def fail(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UsageError, match="disk full"):
        publish(checkpoint(), "it", tmp_path / "bcn.pth")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(hashlib, "sha256", fail)
    with pytest.raises(TypeError):
        publish(checkpoint(), "it", tmp_path / "bcn.pth")
    assert not list(tmp_path.iterdir())


def published(out):
    [line] = [line for line in out.splitlines() if line.startswith("wrote ")]
    return Path(line.split()[1])


def test_tool(tool, save, tmp_path):
    source = save({**checkpoint(), "ema_state_dict": {}}, "iter_20.pth")
    code, out = tool("publish", source, tmp_path / "out" / "bcn.pth")
    assert code == 0
    assert "left out: optimizer, message_hub, param_schedulers, ema_state_dict" in out
    assert "published are the weights averaged by EMAHook" in out
    assert published(out).name.startswith("bcn-")
    assert published(out).is_file()
    code, out = tool("publish", source, tmp_path / "out")  # a folder
    assert code == 0
    assert published(out).parent == tmp_path / "out"
    assert published(out).name.startswith("iter_20-")
    code, out = tool("publish", source, tmp_path / "v1.2")  # no suffix of a checkpoint
    assert published(out).name.startswith("v1.2-")


def test_tool_warns_of_faults_and_of_a_missing_config(tool, save, tmp_path):
    state = checkpoint()["state_dict"]
    state["1.bn.bias"][0] = torch.nan
    code, out = tool("publish", save(state, "flat.pth"), tmp_path / "x.pth")
    assert code == 0
    assert "warning: faults in 1.bn.bias" in out
    assert "holds no config" in out
    assert "left out" not in out


def test_mistakes_say_what_to_do(tool, save, tmp_path):
    source = save(checkpoint(), "a.pth")
    code, out = tool("publish", source, tmp_path / "b.pth", "--format", "safetensors")
    assert code == 1
    assert "--format safetensors contradicts the suffix" in out
    code, out = tool("publish", save({"a": 1}, "empty.pth"), tmp_path / "b.pth")
    assert code == 1
    assert "error: " in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "empty.pth"]
