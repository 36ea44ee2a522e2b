"""Equalization of a checkpoint by the tool."""

import copy

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from mmbcn import set_norm
from mmbcn.analysis.borrowed import evaluating
from mmbcn.analysis.segmentor import run_heads


@pytest.fixture
def config(tiny_config, tmp_path):
    cfg = tiny_config(norm=None)
    set_norm(cfg.model, "none")
    path = tmp_path / "config.py"
    path.write_text(f"default_scope = 'mmseg'\nmodel = {cfg.model.to_dict()!r}\n")
    return path, cfg


def network(cfg):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model)
    for parameter in model.parameters():
        if parameter.numel() == 1:
            parameter.data.fill_(0.5)
    return model


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(256, (3, 40, 56), dtype=torch.uint8, generator=generator)
    with evaluating(model):
        return run_heads(model, dict(inputs=[image]))


def test_tool_keeps_outputs_and_balances(config, tool, save, tmp_path):
    path, cfg = config
    model = network(cfg)
    content = dict(state_dict=model.state_dict(), meta=dict(iter=4), optimizer={}, message_hub={})
    source = save(content, "iter_4.pth")
    code, text = tool("equalize", path, source)
    assert code == 0, text
    written = torch.load(tmp_path / "iter_4_equalized.pth", weights_only=True)
    assert set(written) == {"state_dict", "meta"}
    assert written["meta"]["iter"] == 4
    assert written["meta"]["equalized"].startswith("c = 1, ")
    other = copy.deepcopy(model)
    other.load_state_dict(written["state_dict"])
    for one, two in zip(outputs(other), outputs(model), strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()
    key = "decode_head.conv_seg.weight"
    sums = [m.state_dict()[key].square().sum() for m in (model, other)]
    line = next(line for line in text.splitlines() if line.startswith(key)).split()
    assert line[1:] == [f"{value:.6g}" for value in sums]
    before, after = map(
        float, next(x for x in text.splitlines() if x.startswith("all ")).split()[1:]
    )
    assert after < before
    writers = other.decode_head.bottleneck.conv.weight.square().sum((1, 2, 3)).sqrt()
    readers = other.decode_head.conv_seg.weight.square().sum((0, 2, 3)).sqrt()
    torch.testing.assert_close(readers, writers, rtol=1e-2, atol=0)


def test_tool_works_without_the_auxiliary_head(config, tool, save, tmp_path):
    path, cfg = config
    state = network(cfg).state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("auxiliary_head")}
    code, text = tool("equalize", path, save(dict(state_dict=state)), "--c", "1.1")
    assert code == 0, text
    assert "auxiliary_head" not in text
    written = torch.load(tmp_path / "checkpoint_equalized.pth", weights_only=True)
    assert written["state_dict"].keys() == state.keys()


def cascade(cfg):
    """Two stages, of which the second reads the first one's output, and an auxiliary head."""
    head = dict(cfg.model.auxiliary_head, in_channels=64, in_index=3, concat_input=False)
    cfg.model.update(type="CascadeEncoderDecoder", num_stages=2)
    ocr = {k: v for k, v in head.items() if k not in ("num_convs", "concat_input")}
    cfg.model["decode_head"] = [head, dict(ocr, type="OCRHead", ocr_channels=8)]
    return cfg


def test_tool_keeps_all_outputs_of_a_cascade(config, tool, save, tmp_path):
    path, cfg = config
    cascade(cfg)
    path.write_text(f"default_scope = 'mmseg'\nmodel = {cfg.model.to_dict()!r}\n")
    model = network(cfg)
    code, text = tool("equalize", path, save(dict(state_dict=model.state_dict())))
    assert code == 0, text
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(tmp_path / "checkpoint_equalized.pth")["state_dict"])
    for part in ("backbone", "decode_head.0", "decode_head.1", "auxiliary_head"):
        pairs = zip(*(m.get_submodule(part).parameters() for m in (model, other)), strict=True)
        assert not all(torch.equal(p, q) for p, q in pairs), part
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))

    def run(net):
        with evaluating(net):
            features = net.extract_feat(image)
            first = net.decode_head[0](features)
            return first, net.decode_head[1](features, first), net.auxiliary_head(features)

    for one, two in zip(run(other), run(model), strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()


def test_tool_computes_on_the_cpu(config, tool, save, monkeypatch):
    """GPUs convolve in TF32, by default, and outputs would differ by more than is allowed."""
    path, cfg = config
    monkeypatch.setattr("mmbcn.analysis.segmentor.get_device", lambda: "meta")
    code, text = tool("equalize", path, save(dict(state_dict=network(cfg).state_dict())))
    assert code == 0, text


def test_tool_refuses_norms_and_writes_nothing(config, tool, save, tmp_path):
    path, cfg = config
    set_norm(cfg.model, "bn")
    path.write_text(f"default_scope = 'mmseg'\nmodel = {cfg.model.to_dict()!r}\n")
    source = save(dict(state_dict=network(cfg).state_dict()))
    code, text = tool("equalize", path, source)
    assert code == 1
    assert "normalization layers are in the way" in text
    assert "backbone.stem.1 (BatchNorm2d)" in text
    assert not list(tmp_path.glob("*_equalized*"))


def test_tool_refuses_to_write_what_computes_something_else(
    config, tool, save, tmp_path, monkeypatch
):
    path, cfg = config
    monkeypatch.setattr("mmbcn.analysis.equalize._TOLERANCE", 0.0)
    code, text = tool("equalize", path, save(dict(state_dict=network(cfg).state_dict())))
    assert code == 1
    assert "differ by up to" in text
    assert not list(tmp_path.glob("*_equalized*"))
