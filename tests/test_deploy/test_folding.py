"""Folded models compute what they computed before; what cannot be folded exactly stays."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmbcn
from mmbcn.errors import UsageError
from mmbcn.layers import IC, FrozenBN, NoNorm

BATCH_NORMS = [nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBN, mmbcn.KN, NoNorm]
BCNS = [mmbcn.BCN, mmbcn.MicroBCN, mmbcn.SyncBCN]


def scattered(model, seed=0):
    """The model with affines and running statistics far from those of a new one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                draw(tensor, 0.2, 4)
            elif tensor.is_floating_point() and tensor.dim() == 1 and "preprocessor" not in name:
                draw(tensor, *((-2, 2) if "weight" in name else (-1, 1)))
    return model


def check(model, shape=(2, 3, 15, 17), bound=1e-12, inputs=None):
    """Fold; outputs on other images than those that it was found by stay. Returns the folded."""
    model = scattered(model).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = mmbcn.deploy.fold(model, inputs)
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in folded.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    generator = torch.Generator().manual_seed(1)
    x = 1 + torch.randn(shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        expected, got = copy.deepcopy(model).eval()(x), folded(x)
    assert (got - expected).abs().max() <= bound * expected.abs().max()
    return folded


def kinds(model):
    """The layers by their exact types, without identities and containers."""
    return [type(m) for m in model.modules() if not m._modules and type(m) is not nn.Identity]


@pytest.mark.parametrize("norm", BATCH_NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_goes_into_the_convolution(norm, bias):
    folded = check(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, groups=3, bias=bias), norm(6), nn.ReLU()))
    assert kinds(folded) == [nn.Conv2d, nn.ReLU]
    assert folded.fold_report.folded == {"1": "0"}
    assert not folded.fold_report.left


@pytest.mark.parametrize("norm", BCNS)
def test_only_the_group_stage_of_bcn_stays(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8, num_groups=4))
    folded = check(model)
    assert kinds(folded) == [nn.Conv2d, nn.GroupNorm]
    assert torch.equal(folded[1].weight, model[1].weight.repeat_interleave(2))
    assert (folded[1].num_groups, folded[1].eps) == (4, model[1].eps)
    assert folded.fold_report.stages == {"1": "0"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: mmbcn.BCN(c, num_groups=3)])
def test_transposed_convolutions(groups, norm):
    conv = nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=groups)
    folded = check(nn.Sequential(nn.Conv2d(3, 4, 1), conv, norm(6)))
    assert nn.BatchNorm2d not in kinds(folded)
    assert mmbcn.BCN not in kinds(folded)


@pytest.mark.parametrize("groups", [2, 6])
def test_one_value_for_each_channel(groups):
    pool = nn.AdaptiveAvgPool2d(1)
    norm = mmbcn.BCN(6, num_groups=groups)
    folded = check(nn.Sequential(pool, nn.Conv2d(3, 6, 1), norm), shape=(1, 3, 5, 7))
    assert "2" in folded.fold_report.stages


@pytest.mark.parametrize(
    ("norms", "left"),
    [
        ([nn.BatchNorm2d(6), nn.BatchNorm2d(6)], []),
        ([nn.BatchNorm2d(6), mmbcn.BCN(6, 2), nn.BatchNorm2d(6)], [nn.GroupNorm]),
        ([mmbcn.BCN(6, 2), mmbcn.BCN(6, 3)], [nn.GroupNorm, nn.GroupNorm]),
        ([nn.GroupNorm(2, 6), nn.BatchNorm2d(6)], [nn.GroupNorm]),
        ([nn.Dropout(), nn.Identity(), mmbcn.KN(6)], [nn.Dropout]),
    ],
)
def test_affine_parts_in_a_row_merge(norms, left):
    assert kinds(check(nn.Sequential(nn.Conv2d(3, 6, 3), *norms))) == [nn.Conv2d, *left]


def test_norms_without_a_convolution_merge_and_stay():
    folded = check(
        nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    )
    assert kinds(folded) == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert list(folded.fold_report.left) == ["0"]


@pytest.mark.parametrize(
    ("conv", "gone"),
    [
        (nn.Conv2d(3, 4, 1), True),
        (nn.Conv2d(3, 6, 3, 2, groups=3, bias=False), True),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), True),
        (mmbcn.WSConv2d(3, 4, 3), True),
        (nn.Conv2d(3, 4, 3, padding=1), False),
        (nn.Conv2d(3, 4, 3, padding="same"), False),
        (nn.ConvTranspose2d(3, 4, 3, 2), False),
    ],
)
def test_norm_in_front_goes_forward_where_no_zeros_are_padded(conv, gone):
    folded = check(nn.Sequential(nn.ReLU(), IC(3), conv), inputs=torch.randn(1, 3, 9, 9).double())
    assert (nn.BatchNorm2d not in kinds(folded)) == gone
    assert ("pads zeros" in folded.fold_report.left.get("1.bn", "")) != gone


def test_norms_on_both_sides_of_a_convolution():
    model = nn.Sequential(IC(3), nn.Conv2d(3, 6, 3, groups=3), mmbcn.BCN(6, 2), nn.ReLU())
    folded = check(model)
    assert kinds(folded) == [nn.Dropout, nn.Conv2d, nn.GroupNorm, nn.ReLU]


class Wired(nn.Module):
    """Layers that are joined in ways that forbid folding."""

    def __init__(self, wiring):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.second = nn.BatchNorm2d(4), mmbcn.BCN(4, 2)
        self.wiring = wiring

    def forward(self, x):
        y = self.conv(x)
        return {
            "used twice": lambda: self.norm(y) + y,
            "an output too": lambda: torch.cat([self.norm(y), y]),
            "changed in place": lambda: self.norm(y.add_(1)),
            "a view changed": lambda: self.norm(y) + y.view(y.shape).relu_(),
            "two norms": lambda: self.norm(y) + self.second(y),
            "shared convolution": lambda: self.norm(y) + self.second(self.conv(x * 2)),
            "norm behind another": lambda: self.norm(y) + self.norm(x[:, :1].expand_as(y)),
            "weight used": lambda: self.norm(y) + F.conv2d(x, self.conv.weight, padding=1),
            "norm's weight used": lambda: self.norm(y) * self.norm.weight.sum(),
            "norm's mean used": lambda: self.norm(y) * self.norm.running_mean.sum(),
            "other shape": lambda: self.norm(y.transpose(2, 3)),
        }[self.wiring]()


@pytest.mark.parametrize(
    "wiring",
    [
        *("used twice", "an output too", "changed in place", "a view changed", "two norms"),
        *("shared convolution", "norm behind another", "weight used", "norm's weight used"),
        *("norm's mean used", "other shape"),
    ],
)
def test_what_is_not_exact_stays(wiring):
    folded = check(Wired(wiring))
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert "norm" in folded.fold_report.left


class Box:
    """An output of a kind that nobody knows."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("where", ["output", "box", "attribute"])
def test_output_that_is_given_out_or_kept_too_stays(where):
    class Both(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            if where == "attribute":
                self.features = [y]
                return self[1](y)
            return [self[1](y), y if where == "output" else Box(y)]

    folded = mmbcn.deploy.fold(scattered(Both(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    assert "the model's output, or what the model keeps" in folded.fold_report.left["1"]


def test_norms_that_use_the_batch_stay():
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    norms = [nn.BatchNorm2d(4, track_running_stats=False), Stubborn(4)]
    for norm in norms:
        folded = mmbcn.deploy.fold(scattered(nn.Sequential(nn.Conv2d(3, 4, 1), norm)))
        assert "batch's own statistics" in folded.fold_report.left["1"]


def test_norm_shared_by_convolutions_goes_into_each():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5, padding=1)])
            self.norm = mmbcn.BCN(4, 2)

        def forward(self, x):
            return sum(self.norm(conv(x)) for conv in self.convs)

    folded = check(Shared())
    assert type(folded.norm) is nn.GroupNorm
    assert folded.fold_report.stages == {"norm": "convs.0, convs.1"}


def test_tied_weights_are_folded_apart():
    convs = [nn.Conv2d(3, 3, 3, bias=False) for _ in range(2)]
    convs[1].weight = convs[0].weight
    folded = check(nn.Sequential(convs[0], nn.BatchNorm2d(3), nn.ReLU(), convs[1], mmbcn.BCN(3, 1)))
    assert not folded.fold_report.left


def test_linear_layers_fold_where_channels_are_last():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2))
    x = torch.randn(3, 5).double()
    assert kinds(check(model, (4, 5), inputs=x)) == [nn.Linear, nn.ReLU, nn.Linear]
    model = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7))
    assert nn.BatchNorm1d in kinds(check(model, (4, 7, 7), inputs=torch.randn(1, 7, 7).double()))


def test_weight_standardization_becomes_plain_weights():
    model = nn.Sequential(
        mmbcn.WSConv2d(3, 4, 3, bias=False, eps_inside=False, unbiased=False), mmbcn.BCN(4, 2)
    )
    model.append(nn.ReLU()).append(mmbcn.WSConv2d(4, 4, 3))
    folded = check(model)
    assert kinds(folded) == [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.Conv2d]
    assert folded.fold_report.standardized == ["0", "3"]


def test_mmcv_convws_becomes_plain_weights():
    cnn = pytest.importorskip("mmcv.cnn")
    folded = check(nn.Sequential(cnn.ConvWS2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert kinds(folded) == [nn.Conv2d]


@pytest.mark.parametrize("order", [("conv", "norm", "act"), ("norm", "conv", "act")])
def test_mmcv_conv_module_by_its_norm_name(order):
    cnn = pytest.importorskip("mmcv.cnn")
    cfg = dict(norm_cfg=dict(type="BN"), bias="auto", order=order)
    folded = check(cnn.ConvModule(3, 4, 3, **cfg))
    assert isinstance(folded.norm, nn.Identity)


def test_parametrized_weights_and_foreign_subclasses():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    folded = check(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), Doubling(4)))
    assert folded.fold_report.folded == {"1": "2, behind it"}
    assert "Doubling" in folded.fold_report.left["3"]


def test_layers_with_hooks_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].register_forward_hook(lambda layer, x, y: y.abs())
    assert check(model).fold_report.left == {"1": "has hooks"}


def test_converted_norm_keeps_its_activation():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].drop, model[1].act = nn.Identity(), nn.ReLU()  # as timm's norms have them
    folded = check(mmbcn.convert_norm(model, "bcn"))
    assert kinds(folded[:2]) == [nn.Conv2d, nn.GroupNorm, nn.ReLU]
    assert isinstance(folded[2], mmbcn.BCN)  # behind the activation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: mmbcn.MicroBCN(c, 2)])
def test_half_precision_keeps_its_dtype(dtype, norm):
    model = nn.Sequential(mmbcn.WSConv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model = scattered(model).to(dtype).eval()
    folded = mmbcn.deploy.fold(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    x = torch.randn(2, 3, 9, 9, dtype=dtype)
    expected = copy.deepcopy(model).double()(x.double())
    assert (folded(x) - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_autocast_around_leaves_the_dtypes():
    model = scattered(nn.Sequential(nn.Conv2d(3, 6, 3), mmbcn.BCN(6, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        folded = mmbcn.deploy.fold(model)
    assert {p.dtype for p in folded.parameters()} == {torch.float32}


def test_the_model_may_be_a_layer():
    assert type(check(mmbcn.WSConv2d(3, 4, 3))) is nn.Conv2d
    assert isinstance(check(nn.BatchNorm2d(3), inputs=torch.randn(2, 3, 4, 4).double()), nn.Module)


def test_reports_once(caplog):
    caplog.set_level(logging.INFO, "mmbcn.deploy")
    folded = check(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    )
    text = str(folded.fold_report)
    assert [record.getMessage() for record in caplog.records] == [text]
    assert "folded: 1 into 0" in text
    assert "left: 3: " in text


def test_mistakes_are_told():
    with pytest.raises(TypeError, match="expects a model"):
        mmbcn.deploy.fold(dict(type="EncoderDecoder"))
    with pytest.raises(UsageError, match="inputs="):
        mmbcn.deploy.fold(nn.Linear(3, 4))
    with pytest.raises(UsageError, match="does not run"):
        mmbcn.deploy.fold(nn.Conv2d(3, 4, 3), torch.randn(1, 5, 9, 9))


def test_hidden_reference_to_a_norm_is_noticed():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.hidden = [self.norm]

        def forward(self, x):
            return self.hidden[0](self.conv(x))

    with pytest.raises(UsageError, match="references to its norms"):
        mmbcn.deploy.fold(scattered(Hidden()))


class Two(nn.Module):
    """Two outputs, the second of which ``last`` makes."""

    def __init__(self, last):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), last

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x, self.last(self, x)


def test_difference_of_any_output_is_noticed():
    def last(model, x):  # NaN where the norm is gone
        return x * (1.0 if isinstance(model.norm, nn.BatchNorm2d) else float("nan"))

    with pytest.raises(UsageError, match="outputs differ by nan"):
        mmbcn.deploy.fold(scattered(Two(last)))
    mmbcn.deploy.fold(scattered(Two(lambda model, x: x.where(x > 0, -torch.inf))))


def test_broken_weights_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].running_mean[2] = torch.nan
    with pytest.raises(UsageError, match=r"gives NaN on the image or inputs: .*weights"):
        mmbcn.deploy.fold(model)


def test_model_that_uses_an_attribute_of_a_norm_that_is_gone():
    with pytest.raises(
        UsageError, match=r"not run when it is folded \(AttributeError: .*attributes"
    ):
        mmbcn.deploy.fold(scattered(Two(lambda model, x: x / model.norm.num_features)))


def test_frozen_batch_norm_without_eps():
    class FrozenBatchNorm2d(nn.Module):  # as DETR's
        def __init__(self, channels):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(channels))

        def forward(self, x):
            args = self.running_mean, self.running_var, self.weight, self.bias
            return F.batch_norm(x, *args, eps=1e-5)

    folded = check(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)))
    assert folded.fold_report.folded == {"1": "0"}


@pytest.mark.parametrize("norm", mmbcn.norm_names())
def test_deeplabv3_with_every_norm(norm):
    pytest.importorskip("mmseg")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    from mmbcn.analysis.environment import ROOT

    cfg = Config.fromfile(ROOT / "configs/_base_/models/deeplabv3_r18.py")
    small = dict(
        backbone=dict(stem_channels=8, base_channels=8, with_cp=True),
        decode_head=dict(in_channels=64, channels=16),
        auxiliary_head=dict(in_channels=32, channels=16),
    )
    cfg.merge_from_dict(dict(model=small))
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = scattered(MODELS.build(mmbcn.set_norm(cfg.model, norm)))
    exact = copy.deepcopy(model).double().eval()
    folded, exactly_folded = mmbcn.deploy.fold(model), mmbcn.deploy.fold(exact)
    x = torch.randn(2, 3, 63, 77)
    with torch.no_grad():
        expected, truth = copy.deepcopy(model).eval()(x), exact(x.double())
        got, exactly = folded(x), exactly_folded(x.double())
    scale = truth.abs().max()
    own_error = (expected - truth).abs().max()  # of the model in float32, before it is folded
    assert (got - expected).abs().max() <= max(1e-5 * scale, 2 * own_error)
    assert (exactly - truth).abs().max() <= 1e-12 * scale
    report = folded.fold_report
    base = norm.removesuffix("_ws")
    assert len(report.standardized) == (29 if norm.endswith("_ws") else 0)
    if base in ("gn", "ln", "in"):
        assert not report.folded
        assert not report.stages
    elif base == "ic":
        assert len(report.folded) == 7  # in front of 1x1 convolutions
    else:
        assert len(report.stages if "bcn" in norm else report.folded) == 29
        assert not report.left


class Block(nn.Module):
    """torchvision's BasicBlock: one in-place activation for both places."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


@pytest.mark.parametrize("norm", ["bn", "microbcn_ws", "kn"])
def test_torchvision_style_resnet(norm):
    stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    blocks = Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    model = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *pool)
    folded = check(mmbcn.convert_norm(model, norm), (2, 3, 63, 65))
    assert not folded.fold_report.left
    assert len(folded.fold_report.folded | folded.fold_report.stages) == 9


def test_batch_norm_before_a_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model(torch.randn(50, 3).double() + 2)
    x = torch.randn(5, 3).double()
    model.eval()
    folded = mmbcn.deploy.fold(model, x)
    assert isinstance(folded[2], nn.Identity)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
