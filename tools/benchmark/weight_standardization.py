"""Time weight standardization against mmcv's ConvWS on every convolution of ResNet-50.

Per distinct convolution: the standardization alone (forward and backward), the whole layer (forward
and backward), and the layer in eval without gradients. Outputs and gradients are compared first.

Example:
    python tools/benchmark/weight_standardization.py
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _common import ROOT, Row, command, write_csv
from mmcv.cnn import ConvWS2d
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import Tensor, nn

from mmbcn import WSConv2d
from mmbcn.analysis.environment import environment
from mmbcn.analysis.timing import Timing, markdown_table, time_interleaved
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
`{command}`.

{where}

"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=[64, 128], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--passes", type=int, default=3, help="times over all convolutions")
    parser.add_argument("--seconds", type=float, default=0.1, help="per pass, convolution and part")
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
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each round, by part and layer, of one convolution."""
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
    times = dict(
        standardize=time_interleaved(standardize, seconds), train=time_interleaved(train, seconds)
    )
    with torch.no_grad():
        evaluate = {n: partial(layer.eval(), x) for n, layer in layers.items()}
        times["eval"] = time_interleaved(evaluate, seconds)
    return {(part, n): values for part in times for n, values in times[part].items()}


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    convs = resnet50_convs(args.batch, *args.size)
    times = {name: defaultdict(list) for name in convs}
    for _ in range(args.passes):
        for name, (conv_args, shape) in convs.items():
            for case, values in measure(conv_args, shape, args.seconds, args.device).items():
                times[name][case] += values
    timings = {n: {case: Timing.of(v) for case, v in t.items()} for n, t in times.items()}
    where = environment(args.device)
    rows = [
        dict(conv=name, part=part, layer=layer)
        | {key: round(value, 4) for key, value in timing._asdict().items()}
        | dict(ratio=round(timing.p50 / of_conv[part, "ConvWS"].p50, 3))
        | where
        for name, of_conv in timings.items()
        for (part, layer), timing in of_conv.items()
    ]
    table = markdown_table([ratios(name, of_conv) for name, of_conv in timings.items()])
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if value != "")
    height, width = args.size
    text = HEADING.format(
        batch=args.batch, height=height, width=width, command=command(), where=facts
    )
    write_csv(args.out.with_suffix(".csv"), rows)
    args.out.with_suffix(".md").write_text(text + table + "\n")
    print(table)


def ratios(name: str, timings: dict[tuple[str, str], Timing]) -> Row:
    """One line of the table."""

    def ratio(part: str, layer: str) -> float:
        return timings[part, layer].p50 / timings[part, "ConvWS"].p50

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
