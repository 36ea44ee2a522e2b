"""The measured singularities of several models: their names, their files, their tables."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmbcn.analysis.comparison.scalars import read_scalars
from mmbcn.analysis.singularity import MEASURES, Singularity, mean_measures
from mmbcn.analysis.tables import import_pandas
from mmbcn.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        source: its checkpoint.
        iteration: of its training, where the checkpoint says it.
        config: whose model it is.
        images: on which images.
        found: the statistics.
    """

    source: str
    iteration: int | None
    config: str
    images: str
    found: Singularity

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        own = dict(source=self.source, iteration=self.iteration, config=self.config)
        return dict(**own, images=self.images, **self.found.as_dict())


def read_measured(path: Path) -> list[Measured]:
    """The models in a file of earlier results.

    Raises:
        UsageError: it is no such file.
    """
    try:
        models = json.loads(path.read_text())["models"]
        keys = ("source", "iteration", "config", "images")
        found = [Measured(*(m[k] for k in keys), Singularity.from_dict(m)) for m in models]
        if not all(model.found.layers for model in found) or not found:
            raise ValueError("no layers")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds something else"
        raise UsageError(
            f"{path} is no singularity.json that can be read ({reason}); this tool writes them"
        ) from error


def label_all(models: Sequence[Measured]) -> dict[str, Measured]:
    """The models by short names: the checkpoint's, with the folders that tell it from the others.

    Raises:
        UsageError: a checkpoint was given twice.
    """
    paths = [Path(m.source) for m in models]
    twice = [path for path, number in Counter(paths).items() if number > 1]
    if twice:
        raise UsageError(f"{twice[0]} is given twice")
    bare = [path.with_suffix("") for path in paths]
    paths = bare if len({*bare}) == len(bare) else paths
    tails = [["/".join(p.parts[-n:]) for n in range(1, len(p.parts) + 1)] for p in paths]
    number = Counter(chain.from_iterable(tails))
    names = [next((t for t in ends if number[t] == 1), ends[-1]) for ends in tails]
    return dict(zip(names, models, strict=True))


Run = dict[int, dict[str, float]]  # iteration -> measure -> mean of the layers


def runs_of_checkpoints(models: Sequence[Measured]) -> dict[str, Run]:
    """The models of each folder by iteration; of folders with several iterations."""
    runs: dict[str, Run] = {}
    for model in models:
        if model.iteration is not None:
            run = runs.setdefault(str(Path(model.source).parent), {})
            run[model.iteration] = mean_measures(model.found.layers)
    return {k: dict(sorted(v.items())) for k, v in runs.items() if len(v) > 1}


def run_of_hook(work_dir: Path) -> Run:
    """What ``SingularityHook`` logged in a training.

    Raises:
        UsageError: it logged nothing there.
    """
    names = {key: f"singularity/{key}" for key in MEASURES}
    points = read_scalars(work_dir, names[MEASURES[0]])
    if not points:
        raise UsageError(
            f"{work_dir} has no scalars of SingularityHook. Train with --cfg-options "
            "default_hooks.singularity.type=mmbcn.SingularityHook, or give checkpoints"
        )
    return {p["step"]: {key: p[name] for key, name in names.items()} for p in points}


def tables(models: Mapping[str, Measured]) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """The rows of all layers, and of all channels; the first column is the model's name."""

    def stack(frames: "dict[str, pd.DataFrame]") -> "pd.DataFrame":
        return (
            import_pandas()
            .concat(frames, names=["model"])
            .reset_index("model")
            .reset_index(drop=True)
        )

    return (
        stack({name: model.found.table() for name, model in models.items()}),
        stack({name: model.found.channels() for name, model in models.items()}),
    )
