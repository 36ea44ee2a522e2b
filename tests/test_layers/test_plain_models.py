"""Models of torchvision, timm and segmentation_models_pytorch with our norms, if they import."""

import copy
import importlib
import io

import pytest
import torch
from torch import nn

from mmbcn import BCN, MicroBCN, WSConv2d, convert_norm
from mmbcn.layers import BatchChannelNorm, FrozenBN

KINDS = {"bcn": BCN, "microbcn": MicroBCN, "bcn_ws": BCN}


def find(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision raises more than ImportError beside another torch
        pytest.skip(f"needs {name} ({type(error).__name__}: {error})")


def torchvision_deeplab():
    models = find("torchvision.models.segmentation")
    return models.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4)


def timm_resnet():
    return find("timm").create_model("resnet50", num_classes=4)


def timm_mobilenet():
    """Its norms end in an activation."""
    return find("timm").create_model("mobilenetv3_small_050", num_classes=4)


def smp_deeplab():
    smp = find("segmentation_models_pytorch")
    return smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=4)


MODELS = [torchvision_deeplab, timm_resnet, timm_mobilenet, smp_deeplab]


def images(n=2, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def scores(output):
    return output["out"] if isinstance(output, dict) else output


def count(model, cls):
    return sum(isinstance(m, cls) for m in model.modules())


def randomize(model):
    """Statistics and affines as of a trained model."""
    g = torch.Generator().manual_seed(7)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=g))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("make", MODELS)
def test_trains_loads_back_and_exports(make, norm):
    torch.manual_seed(0)
    model = make()
    total = count(model, nn.modules.batchnorm._BatchNorm)
    convs = count(model, nn.Conv2d)
    assert total > 15
    assert convert_norm(model, norm) is model
    assert count(model, KINDS[norm]) == count(model, BatchChannelNorm) == total
    assert count(model, nn.modules.batchnorm._BatchNorm) == total  # inside of ours
    standardized = count(model, WSConv2d)
    assert standardized == (total if norm.endswith("_ws") else 0)
    assert count(model, nn.Conv2d) == convs

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # in the first, zero-initialised branches pass nothing back
        optimizer.zero_grad()
        loss = scores(model.train()(images())).square().mean()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = convert_norm(make(), norm).eval()
    loaded.load_state_dict(torch.load(file))
    with torch.no_grad():
        expected = scores(model.eval()(images()))
        assert torch.equal(scores(loaded(images())), expected)
        exported = torch.export.export(loaded, (images(),)).module()
        torch.testing.assert_close(scores(exported(images())), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", MODELS)
def test_there_and_back_is_the_same_function(make):
    """BatchNorm, frozen, and BatchNorm again, with activations that timm has inside of norms."""
    model = randomize(make()).eval()
    with torch.no_grad():
        expected = scores(model(images()))
        frozen = convert_norm(copy.deepcopy(model), "frozen_bn")
        torch.testing.assert_close(scores(frozen(images())), expected, rtol=1e-4, atol=1e-4)
        assert count(frozen, FrozenBN) > 15
        back = convert_norm(frozen, "bn").eval()
        torch.testing.assert_close(scores(back(images())), expected, rtol=1e-4, atol=1e-4)


def test_frozen_norms_of_torchvision():
    find("torchvision")
    resnet = importlib.import_module("torchvision.models").resnet18
    frozen = importlib.import_module("torchvision.ops").FrozenBatchNorm2d
    model = resnet(norm_layer=frozen).eval()
    expected = model(images())
    assert count(model, frozen) == 20
    torch.testing.assert_close(convert_norm(copy.deepcopy(model), "bn")(images()), expected)
    convert_norm(model, "bcn").train()(images()).sum().backward()
    assert (count(model, frozen), count(model, BCN)) == (0, 20)
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_norms_of_timm():
    timm = find("timm")
    model = randomize(timm_mobilenet()).eval()
    expected = model(images())
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model))
    assert count(frozen, nn.BatchNorm2d) == 0
    again = convert_norm(frozen, "bn").eval()
    assert count(again, nn.BatchNorm2d) == count(model, nn.BatchNorm2d)
    torch.testing.assert_close(again(images()), expected)


def test_zero_initialised_branches_stay_closed_and_alive():
    """The group stage is zero, as the authors have it: were both, the branch would be dead."""
    norm = nn.BatchNorm2d(4)
    nn.init.zeros_(norm.weight)
    model = convert_norm(nn.Sequential(nn.Conv2d(3, 4, 1), norm), "bcn")
    assert not model(images()).any()
    assert model[1].bn.weight.eq(1).all()
    (model(images()) * images()[:, :1]).sum().backward()
    assert model[1].weight.grad.abs().max() > 1e-3


def test_shared_modules_stay_shared():
    norm = nn.BatchNorm2d(4)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), norm)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, block, nn.ReLU(), block)
    convert_norm(model, "bcn_ws")
    assert model[2] is model[4]
    assert model[1] is model[2][1]
    assert type(model[1]) is BCN
    assert [type(model[0]), type(model[2][0])] == [WSConv2d, WSConv2d]
    assert len(list(model.parameters())) == 2 + 4 + 1
    model(images()).sum().backward()


def test_unknown_batch_norms_are_refused():
    class InPlaceABN(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), InPlaceABN())
    with pytest.raises(ValueError, match="cannot convert 2, a InPlaceABN"):
        convert_norm(model, "bcn")
    assert type(model[1]) is nn.BatchNorm2d  # nothing half done
    lazy = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="a LazyBatchNorm2d"):
        convert_norm(lazy, "bcn")
    lazy(images())
    assert type(convert_norm(lazy, "bcn")[1]) is BCN
