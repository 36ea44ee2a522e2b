"""Exported files compute what the model does, or are not kept."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from mmengine.registry import MODELS, DefaultScope  # noqa: E402

import mmbcn  # noqa: E402
from mmbcn.deploy import evaluate, formats, segmenter, verify  # noqa: E402
from mmbcn.deploy.export import export, export_int8  # noqa: E402
from mmbcn.errors import UsageError  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZE = (48, 56)


@pytest.fixture
def case(tiny_config):
    """A config with a tiny val set, and a model of it that has seen statistics and has classes."""

    def make(norm="bcn"):
        cfg = tiny_config(norm=norm, size=48)
        shipped = copy.deepcopy(cfg.test_dataloader)
        shipped.dataset.update(num_images=3, size=SIZE)
        shipped.update(num_workers=0, persistent_workers=False)
        cfg.val_dataloader = cfg.test_dataloader = shipped
        cfg.val_evaluator = cfg.test_evaluator
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope("mmseg"):
            model = MODELS.build(mmbcn.set_norm(cfg.model, norm))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("running_mean", "running_var", "bn.weight", "bn.bias")):
                tensor.data.add_(torch.rand_like(tensor))
        classifier = model.eval().decode_head.conv_seg
        torch.nn.init.normal_(classifier.weight)
        logits, _ = predictions(model, noise(1, *SIZE))
        classifier.bias.data.sub_(torch.from_numpy(logits.mean((0, 2, 3))))  # several classes occur
        return cfg, model

    return make


def predictions(model, pictures):
    """What mmseg itself predicts: logits and labels of pictures (N, H, W, 3)."""
    images = [torch.from_numpy(p).permute(2, 0, 1) for p in pictures]
    with torch.no_grad():
        samples = model.predict(model.data_preprocessor(dict(inputs=images))["inputs"])
    logits = torch.stack([sample.seg_logits.data for sample in samples])
    labels = torch.cat([sample.pred_sem_seg.data for sample in samples])
    return logits.numpy(), labels.numpy()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("norm", ["bn", "microbcn_ws"])
def test_segmenter_is_what_mmseg_predicts(case, folded, norm):
    _, model = case(norm)
    pictures = noise(2, 45, 67)
    with torch.no_grad():
        labels, logits = segmenter.Segmenter(model, folded)(torch.from_numpy(pictures))
    expected, classes = predictions(model, pictures)
    assert np.abs(logits.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (labels.numpy() == classes).mean() > 0.999
    assert labels.dtype == torch.uint8
    assert len(np.unique(classes)) > 1
    assert model.auxiliary_head is not None


def test_onnx_file_needs_no_config(case, tmp_path):
    cfg, model = case()
    path = tmp_path / "new" / "model.onnx"
    done = export(cfg, {}, model, path, folded=True, dynamic=True, check=True)
    assert done.verified.images == 3 + 2
    assert done.verified.shapes == ((1, 48, 56), (2, 37, 71))
    assert done.verified.agreement > 0.999
    assert len(done.folded.stages) == 29
    session = runtime.InferenceSession(path)
    pictures = noise(3, 61, 33)
    labels, logits = session.run(None, {"images": pictures})
    expected, classes = predictions(model, pictures)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (labels == classes).mean() > 0.999
    props = session.get_modelmeta().custom_metadata_map
    meta = {key: json.loads(value) for key, value in props.items()}
    assert meta["classes"][:2] == ["background", "disc"]
    assert meta["palette"][1] == [230, 60, 60]
    assert (meta["height"], meta["width"]) == SIZE
    assert meta["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert meta["norm"] == ["BCN"]
    assert meta["opset"] == 21
    assert meta["mmbcn"] == mmbcn.__version__
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "GroupNormalization" in kinds
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("kind", ["torchscript", "exported"])
def test_formats_of_torch(case, tmp_path, kind):
    cfg, model = case("bn_ws")
    path = tmp_path / "model"
    done = export(cfg, {}, model, path, kind, dynamic=True, folded=True, check=True)
    assert done.verified.agreement > 0.999
    pictures = noise(3, 61, 33)
    expected, classes = predictions(model, pictures)
    labels, logits = formats.FORMATS[kind].run(path)(pictures)
    assert (labels == classes).mean() > 0.999
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    extra = {formats.METADATA: ""}
    if kind == "torchscript":
        torch.jit.load(path, _extra_files=extra)
    else:
        torch.export.load(path.open("rb"), extra_files=extra)
    assert json.loads(extra[formats.METADATA])["weight_standardization"] is True


def test_older_opset_and_half_precision(case, tmp_path):
    cfg, model = case("bn")
    path = tmp_path / "model.onnx"
    done = export(cfg, {}, model, path, half=True, folded=True, opset=18)
    proto = onnx.load(path)
    assert proto.opset_import[0].version == 18
    assert any(w.data_type == onnx.TensorProto.FLOAT16 for w in proto.graph.initializer)
    pictures = noise(1, *SIZE)
    _, logits = done.run(pictures)
    expected, _ = predictions(model, pictures)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 0.02 * np.abs(expected).max()


def test_wrong_file_is_not_kept(case, tmp_path, monkeypatch):
    cfg, model = case()
    path = tmp_path / "model.ts"
    path.write_bytes(b"older")
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.decode_head.conv_seg.weight)
    write = formats.FORMATS["torchscript"]

    def write_other(made, *args):
        write.write(segmenter.Segmenter(other), *args)

    monkeypatch.setitem(formats.FORMATS, "torchscript", write._replace(write=write_other))
    with pytest.raises(UsageError, match="does not compute what the model does"):
        export(cfg, {}, model, path, "torchscript", check=True)
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.glob("*")] == ["model.ts"]


def test_values_that_are_not_finite_are_noticed(case):
    _, model = case()

    def run(batch):
        expected, classes = predictions(model, batch)
        expected[0, 0, 0, 0] = np.nan
        return classes, expected

    with pytest.raises(UsageError, match="not finite"):
        verify.verify(model, run, [noise(1, 40, 40)])


def test_int8_and_its_miou(case, tmp_path):
    cfg, model = case()
    file = export(cfg, {}, model, tmp_path / "model.onnx", folded=True)
    quantized = export_int8(cfg, file, tmp_path / "model_int8.onnx", 6)
    proto = onnx.load(quantized.path)
    kinds = [node.op_type for node in proto.graph.node]
    convs = [n for n in proto.graph.node if n.op_type == "Conv"]
    made_by = {out: node.op_type for node in proto.graph.node for out in node.output}
    assert len(convs) == 29
    assert all(made_by[name] == "DequantizeLinear" for conv in convs for name in conv.input[:2])
    assert "GroupNormalization" in kinds
    props = {p.key: p.value for p in proto.metadata_props}
    assert props["quantization"] == '"int8"'
    assert "classes" in props
    pictures = noise(1, *SIZE)
    expected, _ = predictions(model, pictures)
    error = np.abs(quantized.run(pictures)[1] - expected).max()
    assert 1e-4 * np.abs(expected).max() < error < 0.3 * np.abs(expected).max()
    images = evaluate.validation_set(cfg)
    assert images.total == 3
    assert images.miou(evaluate.FileModel(model, file.run, file.size)) == pytest.approx(
        images.miou(model), abs=0.5
    )


def test_padding_preprocessor_is_refused(case):
    _, model = case()
    model.data_preprocessor.test_cfg = dict(size_divisor=32)
    with pytest.raises(UsageError, match="pads images"):
        segmenter.Segmenter(model)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"need onnxruntime: pip install 'mmbcn\[deploy\]'"):
        formats.onnx_run(Path("model.onnx"))


def test_importing_mmbcn_loads_nothing_of_it():
    code = "import sys, mmbcn; mmbcn.deploy.fold; print({m[:4] for m in sys.modules} & {'onnx'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr
