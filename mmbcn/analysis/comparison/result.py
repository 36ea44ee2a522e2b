"""What is kept of a run: ``result.json`` and pictures, a few hundred kilobytes."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from mmbcn.analysis.comparison.plan import Run
from mmbcn.analysis.comparison.scalars import read_scalars
from mmbcn.analysis.singularity import MEASURES
from mmbcn.checkpoints.write import whole_file

Result = dict[str, Any]
_CURVE = dict(iter="step", loss="loss", lr="lr")
_SINGULARITY = "singularity"
DONE, DIVERGED, FAILED = "done", "diverged", "failed"


def failure(run: Run, message: str, work_dir: Path) -> Result:
    """The result of a run that did not come to its end."""
    status = DIVERGED if "is not finite" in message else FAILED
    return dict(run=asdict(run), status=status, reason=message, **_training(work_dir))


def success(run: Run, work_dir: Path, test_dir: Path) -> Result:
    """The result of a run that was trained and tested."""
    record = json.loads((test_dir / "record/test.json").read_text())
    pairs = zip(record["classes"], record["intersection"], record["union"], strict=True)
    # of a class that is neither in the truth nor predicted there is no IoU
    classes = {name: 100 * both / union if union else None for name, both, union in pairs}
    found = [value for value in classes.values() if value is not None]
    training = _training(work_dir)
    lost = not all(math.isfinite(loss) for loss in training["curve"]["loss"])
    return dict(
        run=asdict(run),
        status=DIVERGED if lost else DONE,
        reason="the loss is not finite" if lost else "",
        miou=sum(found) / len(found),
        class_iou=classes,
        metrics=record["metrics"],
        images_tested=record["images"],
        palette=record["palette"],
        **training,
    )


def _training(work_dir: Path) -> Result:
    """The curves, times and memory of a training, as far as it came."""
    points = read_scalars(work_dir, "loss")
    curve = {key: [p.get(name) for p in points] for key, name in _CURVE.items()}
    result: Result = dict(curve=curve, singularity=_singularity(work_dir))
    warm = points[1:] or points  # the first point has the start of the loader in it
    if warm:
        result["step_seconds"] = median(p["time"] - p["data_time"] for p in warm)
        result["data_seconds"] = median(p["data_time"] for p in warm)
        memory = [p["memory"] for p in points if "memory" in p]
        result["cuda_bytes"] = max(memory) * 2**20 if memory else None
    return result


def _singularity(work_dir: Path) -> dict[str, Any]:
    """What `SingularityHook` logged: means over the layers, and the layers at the end."""
    points = read_scalars(work_dir, f"{_SINGULARITY}/{MEASURES[0]}")
    if not points:
        return {}
    layers: dict[str, dict[str, float]] = {}
    for key, value in points[-1].items():
        _, _, rest = key.partition(f"{_SINGULARITY}/")
        name, _, measure = rest.rpartition("/")
        if name:
            layers.setdefault(name, {})[measure] = value
    curve = {key: [p[f"{_SINGULARITY}/{key}"] for p in points] for key in MEASURES}
    return dict(iter=[p["step"] for p in points], **curve, layers=layers)


def write_result(result: Result, path: Path) -> None:
    """Write a result; values that are not finite become null."""
    with whole_file(path, "result") as part:
        part.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def read_result(path: Path) -> Result | None:
    """A result; None where there is none, or a file that is damaged."""
    try:
        result = json.loads(path.read_text())
        Run(**result["run"])
        return result if result["status"] in (DONE, DIVERGED, FAILED) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def read_results(out: Path) -> list[Result]:
    """All results in a comparison's folder."""
    found = (read_result(path) for path in sorted(out.glob("runs/*/result.json")))
    return [result for result in found if result is not None]


def keep_pictures(test_dir: Path, run_dir: Path, shared: Path) -> None:
    """Copy predictions to the run's folder, and what is the same for all runs to a shared one."""
    for path in sorted((test_dir / "record").glob("*_*.*g")):
        stem, _, kind = path.stem.rpartition("_")
        folder = run_dir / "predictions" if kind == "prediction" else shared
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{stem}{path.suffix}" if kind == "prediction" else path.name
        with whole_file(folder / name, "picture") as part:
            shutil.copyfile(path, part)
