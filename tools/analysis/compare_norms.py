"""Train a config with several norms under equal rules, and write a report that opens in a browser.

Each run is a process of tools/train.py, then of tools/test.py on the validation set. Finished runs
are skipped and interrupted ones go on, so the same command may be repeated, also with more norms
or seeds. A run that diverges or cannot be trained is a row of the report.

Example:
    python tools/analysis/compare_norms.py CONFIG --norms bn,gn_ws,bcn --batch-sizes 1,2 --seeds 3
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import add_override_arg, make_parser, read_config, run
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmbcn.analysis.comparison.execute import Executor
from mmbcn.analysis.comparison.folder import Place, prepare
from mmbcn.analysis.comparison.plan import EQUAL, LR_RULES, Rules, Run, make_plan, split_list
from mmbcn.analysis.comparison.report import write_report
from mmbcn.analysis.comparison.result import Result

NORMS = "bn,gn,gn_ws,bcn,bcn_ws,microbcn,microbcn_ws"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("config", help="config file, with any norm")
    add("--norms", type=split_list, default=NORMS, help="separated by commas (%(default)s)")
    add("--batch-sizes", type=_numbers(int), default="1,2,8", help="(%(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (%(default)s)")
    add("--iters", type=int, help="iterations at the config's batch size (default: the config's)")
    add(
        "--equal",
        choices=EQUAL,
        default="iterations",
        help="what all batch sizes have equally many of: iterations, or images seen (%(default)s)",
    )
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--lr-rule",
        choices=LR_RULES,
        default="linear",
        help="how the learning rate follows the batch size, from the config's on (%(default)s)",
    )
    rates.add_argument(
        "--lrs", type=_numbers(float), help="instead: try all of these with every norm"
    )
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    add("--out", type=Path, help="folder of results (default: work_dirs/<config stem>_norms)")
    add("--retry-failed", action="store_true", help="run failed and diverged runs again")
    add("--report-only", action="store_true", help="make the report of what is there")
    add_override_arg(parser)
    return parser.parse_args()


def _numbers(kind: type) -> object:
    def numbers(text: str) -> list[int | float]:
        return [kind(item) for item in split_list(text)]

    return numbers


def main() -> None:
    """Train what is missing, then write the report."""
    args = parse_args()
    out = args.out or Path(f"work_dirs/{Path(args.config).stem}_norms")
    interrupted = [] if args.report_only else train(args, out)
    if interrupted:
        print(f"{len(interrupted)} runs are unfinished: repeat the command to go on")
    print(f"wrote {write_report(out)}")
    if interrupted:
        raise SystemExit(1)


def train(args: argparse.Namespace, out: Path) -> list[Run]:
    """Train and test the runs that are not finished; those that were interrupted."""
    cfg = read_config(args)
    keys = ("norms", "batch_sizes", "seeds", "iters", "equal", "lr_rule", "lrs")
    rules = Rules(**{key: getattr(args, key) for key in keys})
    runs = make_plan(cfg, rules)
    executor = Executor(out, args.jobs)
    prepare(cfg, args.config, rules, runs, out, f"python {shlex.join(sys.argv)}")
    missing = [r for r in runs if not Place(out, r).is_finished(args.retry_failed)]
    bar = RunBar(runs, missing)
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C
    interrupted = []
    with bar.bar:
        for ended, result in executor.run_all(missing, bar.update):
            bar.finish(ended, result, ended in executor.busy)
            if result is None:
                interrupted.append(ended)
    return interrupted


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class RunBar:
    """A bar over all runs, in images seen, and a line for each that is in progress."""

    def __init__(self, runs: list[Run], missing: list[Run]) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.console = Console(stderr=True)
        self.bar = Progress(*columns, console=self.console, speed_estimate_period=1200)
        self.runs, self.left = runs, len(missing)
        done = sum(r.images for r in runs) - sum(r.images for r in missing)
        self.all = self.bar.add_task(
            "all runs", total=sum(r.images for r in runs), completed=done, state=self._state()
        )
        self.seen: dict[Run, int] = {}
        self.tasks: dict[Run, int] = {}

    def _state(self) -> str:
        return f"{len(self.runs) - self.left} of {len(self.runs)} runs"

    def update(self, run: Run, title: str, iters: int) -> None:
        """Show how far a run is."""
        if run not in self.tasks:
            self.tasks[run] = self.bar.add_task(run.name, total=run.iters, state="")
            self.seen[run] = 0
        if title == "training":
            title = f"{iters} of {run.iters} iterations"
        self.bar.update(self.tasks[run], completed=iters, state=title)
        self.bar.advance(self.all, max(0, iters - self.seen[run]) * run.batch_size)
        self.seen[run] = max(iters, self.seen[run])

    def finish(self, run: Run, result: Result | None, busy: bool) -> None:
        """Say what came of a run; ``busy``: another process is at it."""
        if run in self.tasks:
            self.bar.remove_task(self.tasks.pop(run))
        if result is None:
            text = "interrupted"
            if busy:
                text = "another process is at it: another comparison, or a training that one which "
                text += "was killed has left. Wait for it, or end it"
            self.console.print(f"{run.name}: {text}", highlight=False, soft_wrap=True)
            return
        self.bar.advance(self.all, (run.iters - self.seen.pop(run, 0)) * run.batch_size)
        self.left -= 1
        self.bar.update(self.all, state=self._state())
        if result["status"] == "done":
            text = f"mIoU {result['miou']:.2f}, {result['step_seconds']:.3f} s a step"
        else:
            text = f"{result['status']}: {result['reason'].splitlines()[0]}"
        self.console.print(f"{run.name}: {text}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
