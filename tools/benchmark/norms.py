"""Time the norms against nn.BatchNorm2d: forward, forward and backward, memory kept for backward.

Every result is compared with a float64 computation before it is timed. Each timed call comes right
after an untimed one of the same norm, so that none pays for the memory that another one left.

Example:
    python tools/benchmark/norms.py --dtypes float32 bfloat16 --layouts contiguous channels_last
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _common import ROOT, Row, command, write_csv
from torch import Tensor, nn

import mmbcn
from mmbcn.analysis.environment import environment
from mmbcn.analysis.timing import Timing, markdown_table, time_interleaved

OUT = ROOT / "tools/benchmark/results/norms"
SHAPES = ["2,64,256,512", "2,256,64,128", "2,512,64,128", "2,2048,64,128", "4,64,128,128"]
LAYOUTS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
GROUPS = 32
KEEP = dict(  # glibc: nothing is mapped for one allocation, nothing given back
    MALLOC_MMAP_THRESHOLD_=str(1 << 40), MALLOC_TRIM_THRESHOLD_=str(1 << 40)
)
CONDITIONS = dict(
    malloc="Memory comes from malloc as it is; page faults are part of the times.",
    reuse_memory="Malloc keeps what is freed: no page faults.",
    cuda="One call at a time: the device's times, or the host's where launching takes longer.",
    graphs="Replays of CUDA graphs: the device's times alone.",
)
HEADING = """# Norms against nn.BatchNorm2d

Times divided by those of `nn.BatchNorm2d` (below 1: faster; medians of interleaved rounds), forward
and backward in training mode; *kept*: bytes saved for backward, in sizes of the input. Forward
alone, milliseconds, quantiles and peak memory are in the CSV beside this file.
{condition} Made by
`{command}`.

{where}

The ratios of all shapes together:

{summary}

"""


class AuthorsBCN(nn.BatchNorm2d):
    """BCN as it is usually written down: a BatchNorm, then a BatchNorm of (1, N G, -1)."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.group_weight = nn.Parameter(torch.ones(1, GROUPS, 1))
        self.group_bias = nn.Parameter(torch.zeros(1, GROUPS, 1))

    def first(self, x: Tensor) -> Tensor:
        """The batch stage."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        z = self.first(x).reshape(1, len(x) * GROUPS, -1)
        z = F.batch_norm(z, None, None, None, None, True, 0.0, self.eps).view(len(x), GROUPS, -1)
        return (self.group_weight * z + self.group_bias).view_as(x)


class AuthorsMicroBCN(AuthorsBCN):
    """Micro-batch BCN in elementary operations."""

    def first(self, x: Tensor) -> Tensor:
        """The batch stage, on running estimates."""
        over = (1, -1, 1, 1)
        with torch.no_grad():
            var = (x - self.running_mean.view(over)).square().mean((0, 2, 3))
            self.running_mean.lerp_(x.mean((0, 2, 3)).float(), 0.1)
            self.running_var.lerp_(var.float(), 0.1)
        x = (x - self.running_mean.view(over)) / (self.running_var.view(over) + self.eps).sqrt()
        return x * self.weight.view(over) + self.bias.view(over)


class OnReference(mmbcn.BCN):
    """BCN with the plain code that the fused one is tested against."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        with backend("reference"):
            return super().forward(x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm": nn.BatchNorm2d,
    "GroupNorm": lambda c: nn.GroupNorm(GROUPS, c),
    "BatchNorm, GroupNorm": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.GroupNorm(GROUPS, c)),
    "authors' BCN": AuthorsBCN,
    "authors' MicroBCN": AuthorsMicroBCN,
    "BCN, reference": OnReference,
    "BCN": mmbcn.BCN,
    "MicroBCN": mmbcn.MicroBCN,
}


@contextmanager
def backend(name: str) -> Any:
    """Compute on this backend."""
    before = os.environ.get("MMBCN_BACKEND")
    os.environ["MMBCN_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("MMBCN_BACKEND")
        if before is not None:
            os.environ["MMBCN_BACKEND"] = before


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,C,H,W")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--norms", nargs="+", default=list(NORMS), choices=list(NORMS))
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile of the reference"
    )
    parser.add_argument(
        "--reuse-memory",
        action="store_true",
        help="let malloc keep what is freed (glibc on Linux): times without page faults",
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="replay CUDA graphs: the times of the device, without the host's for launches",
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape, dtype and layout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="result files, without the suffix")
    return parser.parse_args()


def check(norm: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Compare one training step of BCN, or micro-batch BCN, with float64."""
    norm(x).backward(dy)
    x64, dy64 = x.detach().double().requires_grad_(), dy.double()
    dims = (0, 2, 3)
    mean, var = x64.mean(dims), x64.var(dims, correction=0)
    if isinstance(norm, mmbcn.MicroBCN):  # its first step: all of the batch, around zero
        mean, var = mean.detach(), x64.detach().square().mean(dims)
    z = F.batch_norm(x64, mean.detach(), var.detach(), eps=1e-5)
    if not isinstance(norm, mmbcn.MicroBCN):
        over = (1, -1, 1, 1)
        z = (x64 - mean.view(over)) / (var.view(over) + 1e-5).sqrt()
    y = F.group_norm(z, GROUPS)
    y.backward(dy64)
    with torch.no_grad():
        fresh = type(norm)(norm.num_features).to(x.device)
        error = (fresh(x).double() - y).norm() / y.norm()
        gradient_error = (x.grad.double() - x64.grad).norm() / x64.grad.norm()
    bound = 10 * torch.finfo(x.dtype).eps
    if not max(error, gradient_error) < max(bound, 3e-5):  # torch in channels_last: 1e-5
        raise SystemExit(f"{type(norm).__name__} is wrong: {error:.1e}, {gradient_error:.1e}")
    x.grad = None


def kept_bytes(norm: nn.Module, x: Tensor) -> int:
    """Bytes saved for backward, parameters and buffers excepted; each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*norm.parameters(), *norm.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    return sum(found.values())


def peak_bytes(step: Callable[[], object]) -> int | str:
    """Peak of a step's memory above what was there before; on CUDA."""
    if not torch.cuda.is_initialized():
        return ""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The launches of a step, in a graph; on the current stream, which must not be the default."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph


def condition(args: argparse.Namespace) -> str:
    """What the times are of, in a sentence."""
    if args.device.startswith("cuda"):
        return CONDITIONS["graphs" if args.graphs else "cuda"]
    return CONDITIONS["reuse_memory" if args.reuse_memory else "malloc"]


def measure(args: argparse.Namespace, shape: tuple[int, ...], dtype: str, layout: str) -> list[Row]:
    """Rows of one shape, dtype and layout."""
    torch.manual_seed(0)
    make = dict(dtype=getattr(torch, dtype), device=args.device)
    x, dy = (torch.randn(shape, **make).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    x.add_(0.5).requires_grad_()
    norms = {name: NORMS[name](shape[1]).to(args.device) for name in args.norms}
    if x.is_cuda:  # torch's GroupNorm takes one dtype there
        for norm in norms.values():
            for module in norm.modules():
                if type(module) is nn.GroupNorm:
                    module.to(x.dtype)
    for norm in norms.values():
        if isinstance(norm, mmbcn.BCN | mmbcn.MicroBCN):
            check(type(norm)(shape[1]).to(args.device), x, dy)
    if args.compile:
        norms["BCN, compiled"] = torch.compile(mmbcn.BCN(shape[1]).to(args.device))

    def forward(norm: nn.Module) -> Callable[[], object]:
        return lambda: norm(x)

    def both(norm: nn.Module) -> Callable[[], object]:
        def step() -> None:
            x.grad = None
            norm(x).backward(dy)

        return step

    rows = []
    where = environment(args.device)
    kept = {name: kept_bytes(norm, x) for name, norm in norms.items()}
    for part, function in (("forward", forward), ("forward, backward", both)):
        cases = {name: function(norm) for name, norm in norms.items()}
        timed = {k: captured(v).replay for k, v in cases.items()} if args.graphs else cases
        lists = time_interleaved(timed, args.seconds / 2, warm=True)
        timings = {name: Timing.of(values) for name, values in lists.items()}
        for name, timing in timings.items():
            ratio = timing.p50 / timings["BatchNorm"].p50
            numbers = {k: round(v, 4) for k, v in [*timing._asdict().items(), ("ratio", ratio)]}
            rows.append(
                dict(
                    shape="x".join(map(str, shape)),
                    dtype=dtype,
                    layout=layout,
                    norm=name,
                    part=part,
                    **numbers,
                    kept=round(kept[name] / (x.numel() * x.element_size()), 3),
                    peak_bytes=peak_bytes(cases[name]),
                    **where,
                )
            )
    return rows


def table(rows: list[Row]) -> list[Row]:
    """A line per shape, dtype and layout: the ratios of each norm, and what it keeps."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["part"] == "forward, backward":
            key = tuple(row[k] for k in ("shape", "dtype", "layout"))
            line = lines.setdefault(key, dict(zip(("shape", "dtype", "layout"), key, strict=True)))
            if row["norm"] == "BatchNorm":
                line["BatchNorm, ms"] = row["p50"]
            else:
                line[row["norm"]] = f"{row['ratio']:.2f}"
            if row["norm"] in ("BatchNorm, GroupNorm", "BCN", "MicroBCN"):
                line[f"{row['norm']}, kept"] = row["kept"]
    return list(lines.values())


def summary(rows: list[Row]) -> list[Row]:
    """A line per dtype, layout and batch-channel norm: the median and the worst shape's ratio."""
    ratios: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["part"] == "forward, backward" and row["norm"] in ("BCN", "MicroBCN"):
            key = tuple(row[k] for k in ("dtype", "layout", "norm"))
            ratios.setdefault(key, []).append(row["ratio"])
    names = "dtype", "layout", "norm"
    return [
        dict(zip(names, key, strict=True)) | dict(median=median(values), worst=max(values))
        for key, values in ratios.items()
    ]


def draw(rows: list[Row], path: Path) -> None:
    """A bar chart of the ratios for the first dtype and layout."""
    chosen = [r for r in rows if r["part"] == "forward, backward"]
    chosen = [r for r in chosen if all(r[k] == chosen[0][k] for k in ("dtype", "layout"))]
    shapes = list(dict.fromkeys(r["shape"] for r in chosen))
    names = [n for n in dict.fromkeys(r["norm"] for r in chosen) if n != "BatchNorm"]
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    for i, name in enumerate(names):
        ratios = [r["ratio"] for r in chosen if r["norm"] == name]
        places = [s + (i - len(names) / 2 + 0.5) * 0.8 / len(names) for s in range(len(shapes))]
        axes.bar(places, ratios, 0.8 / len(names), label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("time / time of nn.BatchNorm2d")
    first = chosen[0]
    axes.set_title(f"forward and backward, {first['dtype']}, {first['layout']}, {first['device']}")
    figure.legend(loc="outside lower center", ncols=len(names), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    if args.reuse_memory and not os.environ.keys() >= KEEP.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(args.threads)
    if args.graphs:
        if not args.device.startswith("cuda"):
            raise SystemExit(f"--graphs needs a CUDA device, not --device {args.device}")
        torch.cuda.set_stream(torch.cuda.Stream())
    if "BatchNorm" not in args.norms:
        args.norms.insert(0, "BatchNorm")
    rows = []
    for dtype in args.dtypes:
        for layout in args.layouts:
            for shape in args.shapes:
                rows += measure(args, tuple(map(int, shape.split(","))), dtype, layout)
                print(markdown_table(table(rows)[-1:]).splitlines()[-1], flush=True)
    write_csv(args.out.with_suffix(".csv"), rows)
    facts = environment(args.device)
    where = ", ".join(f"{key} {value}" for key, value in facts.items() if value != "")
    text = HEADING.format(
        command=command(),
        where=where,
        condition=condition(args),
        summary=markdown_table(summary(rows)),
    )
    args.out.with_suffix(".md").write_text(text + markdown_table(table(rows)) + "\n")
    draw(rows, args.out.with_suffix(".png"))
    print(markdown_table(table(rows)), markdown_table(summary(rows)), sep="\n\n")


if __name__ == "__main__":
    main()
