"""What is read, what is refused, and in which words."""

import argparse
import collections
import datetime
import json
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from mmbcn.checkpoints import allowed
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.checkpoints.write import write_checkpoint
from mmbcn.errors import UsageError

LEGACY = dict(_use_new_zipfile_serialization=False)


class Runs:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(params=["torch", "before torch 2.6"])
def either_way(request, monkeypatch):
    """Both unpicklers: torch's own, and the one for versions that cannot be told what to allow."""
    monkeypatch.setattr(allowed, "_BY_TORCH", request.param == "torch")


@pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])
def test_what_mmengine_stores_is_read(either_way, form, tmp_path):
    mmengine = pytest.importorskip("mmengine")
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer()
    for value in (3.0, 1.0, 2.0):
        history.update(value)
    content = {
        "meta": {"epoch": 1, "dataset_meta": {"classes": ("a", "b"), "palette": [[0, 1, 2]]}},
        "state_dict": {"w": torch.arange(3.0)},
        "message_hub": {
            "log_scalars": collections.OrderedDict(loss=history),
            "runtime_info": collections.OrderedDict(
                best=np.float64(0.5), lr=np.float32(0.1), step=np.int64(3), ok=np.bool_(True)
            ),
        },
        "options": mmengine.config.ConfigDict(a=dict(b=1)),
        "array": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "names": np.array(["x", "yz"]),
    }
    path = tmp_path / "own.pth"
    torch.save(content, path, **form)
    found = read_checkpoint(path)
    assert torch.equal(found["state_dict"]["w"], torch.arange(3.0))
    read = found["message_hub"]["log_scalars"]["loss"]
    assert (read.mean(), read.min(), read.statistics("max")) == (2.0, 1.0, 3.0)
    assert found["message_hub"]["runtime_info"] == content["message_hub"]["runtime_info"]
    assert found["meta"] == content["meta"]
    assert found["options"].a.b == 1
    assert np.array_equal(found["array"], content["array"])
    assert found["names"].tolist() == ["x", "yz"]


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numpy_scalars_of_either_version_are_read(either_way, core, tmp_path):
    path, other = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save({"w": torch.ones(1), "best": np.float64(0.25)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in data or b"cnumpy.core.multiarray\n" in data
                here = b"numpy._core" if b"cnumpy._core" in data else b"numpy.core"
                data = data.replace(b"c" + here + b".multiarray", f"c{core}.multiarray".encode())
            new.writestr(name, data)
    assert read_checkpoint(other)["best"] == 0.25


@pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])
def test_more_than_data_is_refused_by_name_and_never_run(either_way, form, tmp_path):
    path, trace = tmp_path / "c.pth", tmp_path / "trace"
    torch.save({"state_dict": {}, "x": Runs(trace)}, path, **form)
    with pytest.raises(UsageError) as error:
        read_checkpoint(path)
    assert not trace.exists()
    assert str(path) in str(error.value)
    assert " open, " in str(error.value) or "io.open" in str(error.value)
    assert "--trust-pickle (trust_pickle=True" in str(error.value)
    read_checkpoint(path, trust_pickle=True)
    assert trace.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_refused_class_is_named(either_way, value, name, tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"state_dict": {"w": torch.ones(1)}, "args": value}, path)
    with pytest.raises(UsageError, match=rf"it holds {name}[,a-zA-Z. ]* and building"):
        read_checkpoint(path)
    assert "w" in read_checkpoint(path, trust_pickle=True)["state_dict"]


def test_getattr_reaches_the_statistics_of_histories_only(either_way, tmp_path):
    pytest.importorskip("mmengine")
    from mmengine.logging import HistoryBuffer

    class Reaches:
        def __init__(self, name):
            self.name = name

        def __reduce__(self):
            return getattr, (HistoryBuffer, self.name)

    torch.save({"w": Reaches("mean")}, tmp_path / "good.pth")
    assert read_checkpoint(tmp_path / "good.pth")["w"] is HistoryBuffer.mean
    torch.save({"w": Reaches("__init__")}, tmp_path / "bad.pth")
    with pytest.raises(UsageError, match=r"it holds HistoryBuffer\.__init__, and building"):
        read_checkpoint(tmp_path / "bad.pth")


def test_whole_module_gives_its_state_if_trusted(tmp_path):
    net = nn.Linear(2, 2)
    torch.save(net, tmp_path / "net.pth")
    with pytest.raises(UsageError, match="Linear"):
        read_checkpoint(tmp_path / "net.pth")
    state = read_checkpoint(tmp_path / "net.pth", trust_pickle=True)["state_dict"]
    assert torch.equal(state["weight"], net.weight)


def good_file(path):
    torch.save({"state_dict": {"w": torch.arange(5000.0)}}, path)
    return path.read_bytes()


def spoil(kind, path):
    if kind == "cut":
        path.write_bytes(good_file(path)[:9000])
    elif kind == "damaged":
        data = bytearray(good_file(path))
        data[data.index(b"PK", 100) + 10] ^= 0xFF
        start = data.index(b"data.pkl")
        data[start + 20 : start + 60] = b"\x11" * 40
        path.write_bytes(data)
    elif kind == "legacy cut":
        torch.save({"state_dict": {"w": torch.arange(5000.0)}}, path, **LEGACY)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("\n<!DOCTYPE html><html><title>Sign in</title></html>")
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    elif kind == "text":
        path.write_text("epoch 1: größer, besser")
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images/1.png", b"")
    elif kind == "torchscript":
        torch.jit.trace(nn.Linear(1, 1), torch.ones(1)).save(str(path))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": 1}))
    elif kind == "tensor":
        torch.save(torch.ones(1), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "noise":
        path.write_bytes(bytes(np.random.default_rng(0).integers(128, 255, 999, np.uint8)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"there is no checkpoint .*bad\.pth\. .* has: good\.pth"),
        ("folder", r"is a folder"),
        ("empty", r"is empty \(0 bytes\): download or copy it again, or take an earlier"),
        ("cut", r"cut short or damaged \(9000 bytes\): download or copy it again"),
        ("damaged", r"damaged"),
        ("legacy cut", r"a pickle that ends too early"),
        ("html", r"an HTML or XML page, as a download that needs a login"),
        ("lfs", r"a Git LFS pointer.*git lfs pull"),
        ("text", r"a text file that begins with 'epoch 1: größer"),
        ("other zip", r"a zip of something else \(images/1\.png"),
        ("torchscript", r"a TorchScript archive; save the module's state_dict\(\)"),
        ("pickle", r"is a pickle"),
        ("tensor", r"expected a dict of weights, found a Tensor"),
        ("noise", r"its format is unknown"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_checkpoint_is_named(kind, message, tmp_path):
    good_file(tmp_path / "good.pth")
    path = tmp_path / "bad.pth"
    spoil(kind, path)
    with pytest.raises(UsageError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def safetensors_file(path, metadata):
    """The format, written by hand: the header's length, the header as JSON, the values."""
    values = torch.arange(4.0)
    header = {
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "__metadata__": metadata,
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())


def test_safetensors_without_the_package_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "a.safetensors"
    safetensors_file(path, {})
    with pytest.raises(UsageError, match="pip install safetensors"):
        read_checkpoint(path)
    with pytest.raises(UsageError, match="pip install safetensors"):
        write_checkpoint({"state_dict": {"w": torch.ones(1)}}, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_safetensors_under_another_name_is_told(tmp_path):
    safetensors_file(tmp_path / "a.pth", {})
    with pytest.raises(UsageError, match=r"rename it to \.safetensors"):
        read_checkpoint(tmp_path / "a.pth")


def test_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    safetensors_file(path, {"format": "pt", "epoch": "3", "classes": '["a", "b"]'})
    found = read_checkpoint(path)
    assert torch.equal(found["state_dict"]["w"], torch.arange(4.0))
    assert found["meta"] == {"format": "pt", "epoch": 3, "classes": ["a", "b"]}
    write_checkpoint({"meta": {"cfg": "x = 1"}, **found}, tmp_path / "b.safetensors")
    assert torch.equal(
        read_checkpoint(tmp_path / "b.safetensors")["state_dict"]["w"], torch.arange(4.0)
    )
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UsageError, match="no safetensors file that can be read"):
        read_checkpoint(path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out" / "c.pth"
    write_checkpoint({"a": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        write_checkpoint({"a": lambda: 1}, path)
    assert read_checkpoint(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["c.pth"]


def test_import_lets_mmengine_read_our_checkpoints(tmp_path):
    """As mmengine 0.10.7 reads them: torch.load with the default of torch >= 2.6."""
    pytest.importorskip("mmengine")
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0], [1])
    torch.save({"hub": history, "best": np.float64(1)}, tmp_path / "c.pth")
    code = f"import mmbcn, torch; torch.load({str(tmp_path / 'c.pth')!r}, weights_only=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
