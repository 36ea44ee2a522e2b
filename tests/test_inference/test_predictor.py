"""Predictions: of images of any kind and size, whole, in windows and augmented."""

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from PIL import Image as Pillow

from mmbcn.datasets.shapes_scene import draw_scene
from mmbcn.inference.predictor import Predictor, UnreadableError


def build(cfg):
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value + 0.2 * torch.randn_like(value))
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.fill_(1.0)
    return model.eval()


@pytest.fixture
def cfg(tiny_config):
    return tiny_config()


def scene(index=0, height=48, width=64):
    return draw_scene(3, index, height, width)[0]


def seen(path, predictor, **options):
    return predictor([predictor.read(path)])[0]


def test_equals_the_model_itself(cfg, tmp_path):
    """Against a softmax of logits that are computed by hand from mmseg's parts."""
    model, image = build(cfg), scene()
    found = Predictor(cfg, model)
    [prediction] = found([found.take(image)])
    pre = model.data_preprocessor
    x = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float()
    with torch.no_grad():
        logits = model.decode_head(model.extract_feat(((x - pre.mean) / pre.std)[None]))
    logits = torch.nn.functional.interpolate(logits, size=(48, 64), mode="bilinear")[0]
    np.testing.assert_allclose(prediction.probabilities, logits.softmax(0), rtol=1e-4, atol=1e-5)
    assert prediction.probabilities.shape == (7, 48, 64)
    assert (prediction.labels == logits.argmax(0).numpy()).mean() > 0.999
    assert len(np.unique(prediction.labels)) > 1
    cv2.imwrite(str(tmp_path / "x.png"), image)
    assert (seen(tmp_path / "x.png", found).labels == prediction.labels).all()


def test_sizes_mix_in_a_batch(cfg):
    found = Predictor(cfg, build(cfg))
    images = [scene(0), scene(1, 40, 40), scene(2), scene(3, 33, 71), scene(4, 40, 40)]
    together = found([found.take(image) for image in images])
    for image, prediction in zip(images, together, strict=True):
        [alone] = found([found.take(image)])
        assert prediction.labels.shape == image.shape[:2]
        np.testing.assert_allclose(prediction.probabilities, alone.probabilities, atol=1e-5)


def test_resized_images_give_labels_of_their_own_size(cfg):
    resize = dict(type="Resize", scale=(32, 32), keep_ratio=True)
    cfg.test_dataloader.dataset.pipeline.insert(1, resize)
    found = Predictor(cfg, build(cfg))
    assert found([found.take(scene(0, 51, 77))])[0].labels.shape == (51, 77)


def test_image_that_resizing_would_leave_no_pixels_of(cfg, tmp_path):
    resize = dict(type="Resize", scale=(32, 32), keep_ratio=True)
    cfg.test_dataloader.dataset.pipeline.insert(1, resize)
    cv2.imwrite(str(tmp_path / "line.png"), np.zeros((1, 3000, 3), np.uint8))
    with pytest.raises(UnreadableError, match="pipeline cannot take an image of 1x3000 pixels"):
        Predictor(cfg, build(cfg)).read(tmp_path / "line.png")


def test_kinds_of_files_are_seen_alike(cfg, tmp_path):
    found = Predictor(cfg, build(cfg))
    image = scene()
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    few = Pillow.fromarray(image[..., ::-1]).quantize(32)
    pairs = {  # the file's content -> what should be seen of it
        "gray": (gray, np.dstack([gray] * 3)),
        "rgba": (np.dstack([image, gray]), image),
        "gray_alpha": (Pillow.merge("LA", [Pillow.fromarray(gray)] * 2), np.dstack([gray] * 3)),
        "16 bits": (image.astype(np.uint16) * 257, image),
        "gray 16 bits": (gray.astype(np.uint16) * 257, np.dstack([gray] * 3)),
        "palette": (few, np.asarray(few.convert("RGB"))[..., ::-1]),
    }
    for name, (content, expected) in pairs.items():
        path = tmp_path / f"{name}.png"
        content.save(path) if hasattr(content, "save") else cv2.imwrite(str(path), content)
        read = found.read(path)
        np.testing.assert_array_equal(read.pixels, expected, err_msg=name)
        [ours], [theirs] = found([read]), found([found.take(np.ascontiguousarray(expected))])
        assert (ours.labels == theirs.labels).all(), name


def test_exif_turns_the_image(cfg, tmp_path):
    found = Predictor(cfg, build(cfg))
    picture = Pillow.fromarray(scene()[..., ::-1])
    exif = picture.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise
    picture.save(tmp_path / "turned.jpg", quality=100, subsampling=0, exif=exif)
    read = found.read(tmp_path / "turned.jpg")
    assert read.pixels.shape == (64, 48, 3)
    shown = np.rot90(scene(), -1)
    assert np.abs(read.pixels.astype(int) - shown).mean() < 2
    assert found([read])[0].labels.shape == (64, 48)


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("fault", ["empty", "text", "cut"])
def test_damaged_files_are_refused(cfg, tmp_path, kind, fault):
    whole = cv2.imencode(f".{kind}", scene())[1].tobytes()
    path = tmp_path / f"x.{kind}"
    path.write_bytes(dict(empty=b"", text=b"hello" * 9, cut=whole[: len(whole) // 2])[fault])
    with pytest.raises(
        UnreadableError, match=dict(empty="empty", text="no image", cut="trunc")[fault]
    ):
        Predictor(cfg, build(cfg)).read(path)


def test_tta_is_the_mean_over_the_views(cfg):
    """The labels against mmseg's own merging, the probabilities against views one by one."""
    model, image = build(cfg), scene()
    found = Predictor(cfg, model, tta=True)
    data = found.take(image).data
    assert len(data["inputs"]) == 4
    for sample in data["data_samples"]:
        sample.set_metainfo(dict(img_path="needed by mmseg"))
    with torch.no_grad():
        [expected] = MODELS.build(dict(cfg.tta_model, module=model)).test_step(
            pseudo_collate([data])
        )
    [prediction] = found([found.take(image)])
    assert (prediction.labels == expected.pred_sem_seg.data.numpy()).all()
    plain = Predictor(cfg, model)
    total = sum(
        np.flip(plain([plain.take(np.ascontiguousarray(np.flip(view, 1)))])[0].probabilities, 2)
        if flip
        else plain([plain.take(view)])[0].probabilities
        for view, flip in ((image, False), (image, True))
    )
    only_flips = cfg.tta_pipeline[1]["transforms"]
    only_flips[0] = only_flips[0][:1]
    found = Predictor(cfg, model, tta=True)
    [prediction] = found([found.take(image)])
    np.testing.assert_allclose(prediction.probabilities, total / 2, rtol=1e-4, atol=1e-5)


def test_one_output_has_a_threshold(cfg):
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.5)
    cfg.model.decode_head.loss_decode.use_sigmoid = True
    model, image = build(cfg), scene()
    found = Predictor(cfg, model)
    [first] = found([found.take(image)])
    assert first.probabilities.shape == (1, 48, 64)
    model.decode_head.threshold = float(np.median(first.probabilities))
    [prediction] = found([found.take(image)])
    above = prediction.probabilities[0] > model.decode_head.threshold
    assert (prediction.labels == above).all()
    assert set(np.unique(prediction.labels)) == {0, 1}
