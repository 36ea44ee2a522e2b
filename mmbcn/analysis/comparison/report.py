"""Writes the report of a comparison: one page that needs nothing else, and the same as JSON."""

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mmbcn.analysis.comparison import figures
from mmbcn.analysis.comparison.folder import Place, read_comparison
from mmbcn.analysis.comparison.plan import Run
from mmbcn.analysis.comparison.result import Result, read_results
from mmbcn.analysis.comparison.summary import (
    LEVEL,
    MIN_SEEDS,
    Group,
    Verdict,
    choose_rates,
    conclusion,
    group_runs,
    judge,
)
from mmbcn.checkpoints.write import whole_file
from mmbcn.errors import UsageError

_MEASURES = dict(
    sigma_mu="std of channel means",
    sigma_sigma="std of channel stds",
    dead="dead channels, share",
    kl="KL from N(0, 1)",
)
_SHORT = 90  # characters of a reason in the table


def write_report(out: Path) -> Path:
    """Write ``report.html`` and ``report.json``; returns the first.

    Raises:
        UsageError: there is no comparison in the folder.
    """
    comparison = read_comparison(out)
    runs = [Run(**run) for run in comparison["runs"]]
    found = {Run(**result["run"]): result for result in read_results(out)}
    results = [found[run] for run in runs if run in found]  # in the order of the plan
    if not results:
        raise UsageError(f"no run in {out} has ended yet")
    groups = group_runs(results)
    chosen = choose_rates(groups)
    verdicts = judge(chosen)
    missing = [run.name for run in runs if run not in found]
    content = dict(
        comparison=comparison,
        missing=missing,
        verdicts=[_verdict(v) for v in verdicts],
        groups=[_group(g, g in chosen) for g in groups],
        environments=_distinct([r["environment"] for r in results]),
        results={Run(**r["run"]).name: _without_curves(r) for r in results},
    )
    with whole_file(out / "report.json", "report") as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    page = _page(out, content, results, verdicts, groups, chosen)
    with whole_file(out / "report.html", "report") as part:
        part.write_text(page)
    return out / "report.html"


def _verdict(verdict: Verdict) -> dict[str, Any]:
    best = verdict.best
    return dict(
        batch_size=verdict.batch_size,
        best=best.norm if best else None,
        **verdict.others(),
        conclusion=conclusion(verdict),
        p_values={" / ".join(sorted(pair)): p for pair, p in verdict.p.items()},
    )


def _group(group: Group, is_chosen: bool) -> dict[str, Any]:
    return dict(
        norm=group.norm,
        batch_size=group.batch_size,
        lr=group.lr,
        chosen=is_chosen,
        miou=group.mious,
        mean=group.mean,
        std=group.std,
        failures={r["run"]["seed"]: r["reason"] for r in group.failures},
        step_seconds=group.mean_of("step_seconds"),
        process_bytes=group.mean_of("process_bytes"),
        cuda_bytes=group.mean_of("cuda_bytes"),
        class_iou=group.mean_class_iou(),
    )


def _without_curves(result: Result) -> Result:
    return {key: value for key, value in result.items() if key not in ("curve", "singularity")}


def _distinct(facts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Each fact's values over all runs; more than one where runs differ."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    values = {key: dict.fromkeys(fact.get(key) for fact in facts) for key in keys}
    return {key: [v for v in found if v not in ("", None)] for key, found in values.items()}


def _page(
    out: Path,
    content: dict[str, Any],
    results: Sequence[Result],
    verdicts: Sequence[Verdict],
    groups: Sequence[Group],
    chosen: Sequence[Group],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    drawings = dict(
        miou=figures.draw_miou(verdicts),
        losses=figures.draw_losses(verdicts),
        costs=figures.draw_costs(verdicts),
        singularities=figures.draw_singularities(verdicts, _MEASURES),
    )
    finished = [r for r in results if r["status"] == "done"]
    return environment.get_template("report.html.j2").render(
        **content,
        norms=list(dict.fromkeys(group.norm for group in chosen)),
        judged=verdicts,
        conclusions=[conclusion(verdict) for verdict in verdicts],
        all_groups=groups,
        several_rates=len(groups) > len(chosen),
        figures={name: svg and Markup(svg) for name, svg in drawings.items()},
        runs=results,
        commands_of={name: _commands(out, name) for name in content["results"]},
        classes=_classes(finished),
        pictures=_pictures(out, verdicts),
        images=max((r["images_tested"] for r in finished), default=0),
        has_cuda=any(group.mean_of("cuda_bytes") for group in chosen),
        level=LEVEL,
        min_seeds=MIN_SEEDS,
        color_of=figures.color_of,
    )


def _short(text: str) -> str:
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= _SHORT else line[: _SHORT - 1] + "…"


def _commands(out: Path, name: str) -> list[str]:
    """The commands that train and test one run again."""
    folder = out / "runs" / name
    config, work = shlex.quote(str(folder / "config.py")), shlex.quote(str(folder / "work"))
    iters = json.loads((folder / "result.json").read_text())["run"]["iters"]
    return [
        f"python tools/train.py {config} --work-dir {work} --resume",
        f"python tools/test.py {config} {work}/iter_{iters}.pth --work-dir {work}/test",
    ]


def _classes(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The classes, each with its colour."""
    if not results:
        return []
    names, palette = results[0]["class_iou"], results[0]["palette"]
    return [
        (name, f"rgb({', '.join(map(str, color))})")
        for name, color in zip(names, palette, strict=False)
    ]


def _pictures(out: Path, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Of each image: itself, its truth, and for each batch size what each norm predicts."""
    pictures = []
    for image in sorted((out / "images").glob("*_image.jpg")):
        stem = image.name.removesuffix("_image.jpg")
        rows = []
        for verdict in verdicts:
            tiles = []
            for group in verdict.groups:
                seed = min(group.mious, default=None)
                tiles.append((group.norm, seed, _prediction(out, group, seed, stem)))
            rows.append((verdict.batch_size, tiles))
        truth = image.with_name(f"{stem}_truth.png")
        with Image.open(image) as opened:
            ratio = opened.width / opened.height
        content = dict(image=_data(image), truth=_data(truth), ratio=f"{ratio:.4f}")
        pictures.append(dict(name=stem, rows=rows, **content))
    return pictures


def _prediction(out: Path, group: Group, seed: int | None, stem: str) -> str | None:
    """The address of a prediction; None: there is none."""
    if seed is None:
        return None
    folder = Place(out, Run(**group.results[seed]["run"])).folder
    path = folder / "predictions" / f"{stem}.png"
    return _data(path) if path.is_file() else None


def _data(path: Path) -> str:
    """A picture as an address that holds it."""
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
