"""Time weight standardization against mmcv's ConvWS on every convolution of ResNet-50.

Per distinct convolution: the standardization alone (forward and backward), the whole layer (forward
and backward), and the layer in eval without gradients. Outputs and gradients are compared first.

Example:
    python tools/benchmark/weight_standardization.py
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _common import ROOT, Row, Timing, environment, markdown_table, time_interleaved, write_csv
from mmcv.cnn import ConvWS2d
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import Tensor, nn

from mmbcn import WSConv2d
from mmbcn.ops import standardize_weight

OUT = ROOT / "tools/benchmark/results/weight_standardization"
CONV_ARGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
SAME, DEFAULT = "WSConv2d, ConvWS's formula", "WSConv2d"
LAYERS = {  # what is built, with which arguments besides the convolution's own
    "ConvWS": (ConvWS2d, {}),
    SAME: (WSConv2d, dict(eps_inside=False)),
    DEFAULT: (WSConv2d, {}),
    "Conv2d": (nn.Conv2d, {}),
}
HEADING = """# Weight standardization against mmcv's ConvWS

Times divided by those of ConvWS (below 1: faster; medians of interleaved rounds) for every distinct
convolution of ResNet-50 at output stride 8, with both stems. Batch {batch}, crops of
{height}x{width}, float32. *standardize*: the weights alone, forward and backward; *train*: the
layer, forward and backward; *eval*: the layer without gradients, where `WSConv2d` keeps the
standardized weights. Columns marked *same* have ConvWS's formula, the others `WSConv2d`'s default.
Times in milliseconds are in the CSV beside this file. Made by
`python tools/benchmark/weight_standardization.py`.

{where}

"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=[64, 128], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.7, help="per convolution and part")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="result files, without the suffix")
    return parser.parse_args()


def resnet50_convs(batch: int, height: int, width: int) -> dict[str, tuple[dict, tuple[int, ...]]]:
    """Constructor arguments and input shape of each distinct convolution, by a short name."""
    register_all_modules()
    backbone = Config.fromfile(ROOT / "configs/_base_/models/deeplabv3_r50.py").model.backbone
    found = {}

    def note(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        args = {key: getattr(conv, key) for key in CONV_ARGS}
        shape = tuple(inputs[0].shape)
        kernel, stride, dilation = (args[k][0] for k in ("kernel_size", "stride", "dilation"))
        name = f"{conv.in_channels}-{conv.out_channels} {kernel}x{kernel}"
        name += f" s{stride}" * (stride > 1) + f" d{dilation}" * (dilation > 1)
        found[f"{name}, {shape[2]}x{shape[3]}"] = (args, shape)

    for kind in ("ResNet", "ResNetV1c"):  # a stem of one convolution, of three
        backbone.type = kind
        net = MODELS.build(backbone)
        net.eval()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(note)
        with torch.no_grad():
            net(torch.zeros(batch, 3, height, width))
    return found


def convws_weight(weight: Tensor) -> Tensor:
    """The lines of mmcv's ``conv_ws_2d`` before its convolution."""
    flat = weight.view(weight.size(0), -1)
    mean = flat.mean(dim=1, keepdim=True).view(-1, 1, 1, 1)
    std = flat.std(dim=1, keepdim=True).view(-1, 1, 1, 1)
    return (weight - mean) / (std + 1e-5)


def forward_backward(function: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> Callable:
    """A call of one forward and one backward pass, which gives the leaves' gradients."""
    return lambda: torch.autograd.grad(function(), leaves, dy)


def measure(
    args: dict, shape: tuple[int, ...], seconds: float, device: str
) -> dict[str, dict[str, Timing]]:
    """Timings of one convolution, by part and layer."""
    torch.manual_seed(0)
    layers = {n: cls(**args, **more, bias=False).to(device) for n, (cls, more) in LAYERS.items()}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(layers["ConvWS"].weight)
    x = torch.randn(shape, device=device, requires_grad=True)
    dy = torch.randn_like(layers["ConvWS"](x))
    dw = torch.randn_like(layers["ConvWS"].weight)
    train = {
        n: forward_backward(partial(layer, x), [x, layer.weight], dy) for n, layer in layers.items()
    }
    for ours, theirs in zip(train[SAME](), train["ConvWS"](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    standardize = {
        n: forward_backward(partial(form, layers[n].weight), [layers[n].weight], dw)
        for n, form in (
            ("ConvWS", convws_weight),
            (SAME, partial(standardize_weight, eps_inside=False)),
            (DEFAULT, standardize_weight),
        )
    }
    timings = dict(
        standardize=time_interleaved(standardize, seconds), train=time_interleaved(train, seconds)
    )
    with torch.no_grad():
        evaluate = {n: partial(layer.eval(), x) for n, layer in layers.items()}
        timings["eval"] = time_interleaved(evaluate, seconds)
    return timings


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    where = environment(args.device)
    rows, table = [], []
    for name, (conv_args, shape) in resnet50_convs(args.batch, *args.size).items():
        timings = measure(conv_args, shape, args.seconds, args.device)
        for part, layers in timings.items():
            for layer, timing in layers.items():
                ratio = timing.p50 / layers["ConvWS"].p50
                values = {k: round(v, 4) for k, v in [*timing._asdict().items(), ("ratio", ratio)]}
                rows.append(dict(conv=name, part=part, layer=layer, **values, **where))
        table.append(ratios(name, timings))
    write_csv(args.out.with_suffix(".csv"), rows)
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if value != "")
    text = HEADING.format(batch=args.batch, height=args.size[0], width=args.size[1], where=facts)
    args.out.with_suffix(".md").write_text(text + markdown_table(table) + "\n")
    print(markdown_table(table))


def ratios(name: str, timings: dict[str, dict[str, Timing]]) -> Row:
    """One line of the table."""

    def ratio(part: str, layer: str) -> float:
        return timings[part][layer].p50 / timings[part]["ConvWS"].p50

    return {
        "convolution": name,
        "standardize, same": ratio("standardize", SAME),
        "standardize": ratio("standardize", DEFAULT),
        "train, same": ratio("train", SAME),
        "train": ratio("train", DEFAULT),
        "eval, same": ratio("eval", SAME),
        "eval": ratio("eval", DEFAULT),
        "eval, Conv2d": ratio("eval", "Conv2d"),
    }


if __name__ == "__main__":
    main()
