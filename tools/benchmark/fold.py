"""Time whole eval forward passes of DeepLabV3 with different norms, as they are and folded.

All models are timed in turn, in one run. Outputs are compared before.

Example:
    python tools/benchmark/fold.py --backbone r50 --norms bn bcn microbcn_ws kn --size 256 512
"""

import argparse
from pathlib import Path

import torch
from _common import ROOT, Row, command, write_csv
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import nn

import mmbcn
from mmbcn.analysis.environment import environment
from mmbcn.analysis.timing import Timing, markdown_table, time_interleaved

OUT = ROOT / "tools/benchmark/results/fold"
HEADING = """# Folded norms

Eval forward of DeepLabV3 {backbone}, {batch} x {size[0]}x{size[1]}, float32: medians of rounds in
turn, as the model is and after `mmbcn.deploy.fold`; *difference*: of the outputs, as a share of the
largest one. The machine is shared: other programs ran at the same time. Made by
`{command}`.

{where}

"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="r50", choices=["r18", "r50", "r101"])
    parser.add_argument("--norms", nargs="+", default=["bn", "bcn", "microbcn_ws", "kn"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 512], metavar=("H", "W"))
    parser.add_argument("--seconds", type=float, default=120.0, help="for all models together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="result files, without the suffix")
    return parser.parse_args()


def build(backbone: str, norm: str, device: str) -> nn.Module:
    """A model in eval mode, its batch affines and running statistics not those of a new one."""
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / f"configs/_base_/models/deeplabv3_{backbone}.py")
    model = MODELS.build(mmbcn.set_norm(cfg.model, norm)).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("running_mean", "running_var", "bn.weight", "bn.bias")):
            tensor.data.add_(0.5 * torch.rand_like(tensor))
    return model.to(device)


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    register_all_modules()
    images = torch.randn(args.batch, 3, *args.size, device=args.device)
    models, differences = {}, {}
    for norm in args.norms:
        model = build(args.backbone, norm, args.device)
        folded = mmbcn.deploy.fold(model)
        expected = model(images)
        differences[norm] = ((folded(images) - expected).abs().max() / expected.abs().max()).item()
        models |= {(norm, "as it is"): model, (norm, "folded"): folded}
    cases = {key: lambda model=model: model(images) for key, model in models.items()}
    timings = {k: Timing.of(v) for k, v in time_interleaved(cases, args.seconds).items()}
    where = environment(args.device)
    rows: list[Row] = []
    table: list[Row] = []
    for norm in args.norms:
        base, short = timings[norm, "as it is"].p50, timings[norm, "folded"].p50
        for form in ("as it is", "folded"):
            timing = timings[norm, form]
            numbers = dict(timing._asdict(), ratio=timing.p50 / base)
            rows.append(
                dict(
                    backbone=args.backbone,
                    batch=args.batch,
                    size=f"{args.size[0]}x{args.size[1]}",
                    norm=norm,
                    form=form,
                    **{key: round(value, 3) for key, value in numbers.items()},
                    difference=f"{differences[norm]:.1e}",
                    **where,
                )
            )
        table.append(
            {
                "norm": norm,
                "as it is, ms": base,
                "folded, ms": short,
                "folded / as it is": short / base,
                "difference": f"{differences[norm]:.1e}",
            }
        )
    write_csv(args.out.with_suffix(".csv"), rows)
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if value != "")
    values = dict(backbone=args.backbone, batch=args.batch, size=args.size)
    text = HEADING.format(**values, command=command(), where=facts)
    args.out.with_suffix(".md").write_text(text + markdown_table(table) + "\n")
    print(markdown_table(table))


if __name__ == "__main__":
    main()
