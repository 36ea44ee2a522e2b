"""APR-P: the batch is doubled with the right images and labels, and both halves are learned."""

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmbcn import set_norm
from mmbcn.errors import UsageError
from mmbcn.models import APRPairDataPreProcessor

NORMAL = dict(
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    size=(32, 32),
    pad_val=0,
    seg_pad_val=255,
)


def batch(number=4, size=(32, 32), classes=7):
    g = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(number):
        inputs.append(torch.randint(0, 256, (3, *size), generator=g, dtype=torch.uint8))
        label = torch.randint(0, classes, (1, *size), generator=g)
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_sem_seg = PixelData(data=label)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def amplitude(x):
    return np.abs(np.fft.fftn(x.double().numpy()))


@pytest.mark.parametrize("size", [(32, 32), (30, 25)])
def test_first_half_is_that_of_mmseg_and_second_has_other_amplitudes(size):
    torch.manual_seed(0)
    plain = SegDataPreProcessor(**NORMAL)(batch(size=size), training=True)
    out = APRPairDataPreProcessor(prob=1.0, **NORMAL)(batch(size=size), training=True)
    x, mixed = out["inputs"].split(4)
    assert torch.equal(x, plain["inputs"])
    donors = []
    for i in range(4):
        a = amplitude(mixed[i])
        off = [np.abs(a - amplitude(x[j])).max() / amplitude(x[j]).max() for j in range(4)]
        donors.append(int(np.argmin(off)))
        assert min(off) <= 1e-4
        own, new = np.fft.fftn(x[i].double().numpy()), np.fft.fftn(mixed[i].double().numpy())
        strong = (np.abs(own) > 1) & (np.abs(new) > 1)
        turned = np.angle(new[strong] / own[strong])
        assert np.abs(turned).max() < 1e-3
    assert sorted(donors) == [0, 1, 2, 3]
    assert donors != [0, 1, 2, 3]


def test_labels_are_those_of_the_phase_twice():
    data = batch(size=(30, 25))
    labels = [s.gt_sem_seg.data.clone() for s in data["data_samples"]]
    out = APRPairDataPreProcessor(prob=1.0, **NORMAL)(data, training=True)
    assert len(out["data_samples"]) == len(out["inputs"]) == 8
    for sample, label in zip(out["data_samples"], labels * 2, strict=True):
        padded = sample.gt_sem_seg.data
        assert padded.shape == (1, 32, 32)
        assert torch.equal(padded[:, :30, :25], label)
        assert padded[:, 30:].eq(255).all()
        assert sample.padding_size == (0, 7, 0, 2)
    assert len({id(s) for s in out["data_samples"]}) == 8


def test_without_exchange_each_image_comes_twice():
    out = APRPairDataPreProcessor(prob=0.0, **NORMAL)(batch(), training=True)
    assert torch.equal(out["inputs"][:4], out["inputs"][4:])


def test_probability_is_that_of_a_batch():
    torch.manual_seed(0)
    preprocessor = APRPairDataPreProcessor(prob=0.3, size=(8, 8))
    exchanged = 0
    for _ in range(300):
        x, mixed = preprocessor(batch(6, (8, 8)), training=True)["inputs"].split(6)
        exchanged += not torch.equal(x, mixed)
    assert 60 < exchanged < 120  # 90, four standard deviations of 7.9


def test_tests_are_as_before():
    data, plain = batch(1, (30, 25)), batch(1, (30, 25))
    options = dict(NORMAL, size=None, size_divisor=16, test_cfg=dict(size_divisor=32))
    out = APRPairDataPreProcessor(prob=1.0, **options)(data, training=False)
    expected = SegDataPreProcessor(**options)(plain, training=False)
    assert torch.equal(out["inputs"], expected["inputs"])
    assert len(out["data_samples"]) == 1


def test_takes_the_other_options_of_mmseg():
    options = dict(NORMAL, size=None, size_divisor=16, rgb_to_bgr=False, seg_pad_val=7)
    out = APRPairDataPreProcessor(prob=1.0, **options)(batch(2, (30, 25)), training=True)
    assert out["inputs"].shape == (4, 3, 32, 32)
    assert out["data_samples"][3].gt_sem_seg.data[0, -1, -1] == 7


def test_loss_is_the_mean_of_both_halves(tiny_config):
    """Of a network whose images do not meet: with statistics of the batch they would."""
    init_default_scope("mmseg")
    cfg = set_norm(tiny_config(size=32).model, "gn")
    cfg.data_preprocessor.update(type="mmbcn.APRPairDataPreProcessor", prob=1.0)
    cfg.decode_head.dropout_ratio = cfg.auxiliary_head.dropout_ratio = 0
    torch.manual_seed(0)
    model = MODELS.build(cfg).train()
    assert isinstance(model.data_preprocessor, APRPairDataPreProcessor)
    for head in (model.decode_head, model.auxiliary_head):
        torch.nn.init.normal_(head.conv_seg.weight)  # else all classes are equally likely
    out = model.data_preprocessor(batch(3), training=True)

    def loss(part):
        losses = model.loss(out["inputs"][part], out["data_samples"][part])
        return model.parse_losses(losses)[0]

    whole, first, second = loss(slice(6)), loss(slice(3)), loss(slice(3, 6))
    torch.testing.assert_close(whole, (first + second) / 2)
    assert (first - second).abs() > 1e-5
    whole.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_single_image_is_refused_in_training_only():
    preprocessor = APRPairDataPreProcessor(**NORMAL)
    with pytest.raises(UsageError, match="expects batches of 2 images or more in training, got 1"):
        preprocessor(batch(1), training=True)
    with pytest.raises(UsageError, match="prob between 0 and 1"):
        APRPairDataPreProcessor(prob=-0.1)
