"""What the runs of a comparison say together: means over the seeds, and which differ for sure.

The runs of one seed begin with the same weights (norms draw none) and see the same crops in the
same order, so norms are compared within each seed: by the two-sided paired t-test on the mIoU. All
pairs of norms of a batch size are tested, and their p-values raised for that after Holm 1979: if no
two norms really differ, the chance that any pair comes out below 0.05 is 5 % at most, also though
the best one is picked after the fact.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

from scipy.stats import ttest_rel

from mmbcn.analysis.comparison.result import DONE, Result

MIN_SEEDS = 3  # with fewer, nothing is tested
LEVEL = 0.05
Pair = frozenset[str]


@dataclass
class Group:
    """The runs that differ in nothing but the seed.

    Attributes:
        norm: name of the normalization.
        batch_size: images per iteration.
        lr: learning rate.
        results: of each run that has ended, by seed.
    """

    norm: str
    batch_size: int
    lr: float
    results: dict[int, Result] = field(default_factory=dict)

    @property
    def mious(self) -> dict[int, float]:
        """The mIoU in percent of each run that came to its end, by seed."""
        return {seed: r["miou"] for seed, r in self.results.items() if r["status"] == DONE}

    @property
    def mean(self) -> float | None:
        """Of the mIoU."""
        return fmean(self.mious.values()) if self.mious else None

    @property
    def std(self) -> float | None:
        """Of the mIoU, unbiased; None with fewer than two runs."""
        return stdev(self.mious.values()) if len(self.mious) > 1 else None

    @property
    def failures(self) -> list[Result]:
        """The runs that did not come to their end."""
        return [r for r in self.results.values() if r["status"] != DONE]

    def mean_of(self, key: str) -> float | None:
        """The mean of a number over the runs that came to their end and have it."""
        values = [self.results[seed].get(key) for seed in self.mious]
        values = [value for value in values if value is not None]
        return fmean(values) if values else None

    def mean_class_iou(self) -> dict[str, float | None]:
        """The mean IoU of each class over the seeds."""
        tables = [self.results[seed]["class_iou"] for seed in self.mious]
        names = dict.fromkeys(name for table in tables for name in table)
        found = {n: [t[n] for t in tables if t.get(n) is not None] for n in names}
        return {name: fmean(values) if values else None for name, values in found.items()}


@dataclass
class Verdict:
    """How the norms of one batch size compare.

    Attributes:
        batch_size: images per iteration.
        groups: one for each norm, in the order of their names in the plan.
        p: the p-value of each pair of norms, corrected; of those that could be tested.
    """

    batch_size: int
    groups: list[Group]
    p: dict[Pair, float]

    @property
    def best(self) -> Group | None:
        """The group of the highest mean."""
        finished = [group for group in self.groups if group.mean is not None]
        return max(finished, key=lambda group: group.mean or 0, default=None)

    def p_to_best(self, group: Group) -> float | None:
        """The corrected p-value of a group's difference from the best one."""
        return self.p.get(frozenset((group.norm, self.best.norm))) if self.best else None

    def others(self) -> dict[str, list[str]]:
        """The other norms with a result: those that differ from the best one for sure, and so on.

        By ``"significant"``, ``"not significant"`` and ``"not tested"``.
        """
        sorts: dict[str, list[str]] = {"significant": [], "not significant": [], "not tested": []}
        for group in self.groups:
            if group is not self.best and group.mious:
                p = self.p_to_best(group)
                sure = "significant" if p is not None and p < LEVEL else "not significant"
                sorts["not tested" if p is None else sure].append(group.norm)
        return sorts


def group_runs(results: Sequence[Result]) -> list[Group]:
    """The groups, in the order in which their first runs come."""
    groups: dict[tuple[str, int, float], Group] = {}
    for result in results:
        key = tuple(result["run"][k] for k in ("norm", "batch_size", "lr"))
        group = groups.setdefault(key, Group(*key))
        group.results[result["run"]["seed"]] = result
    return list(groups.values())


def choose_rates(groups: Sequence[Group]) -> list[Group]:
    """Of several learning rates of a norm and batch size, the group of the best one.

    With the most runs that came to their end; among these the highest mean mIoU.
    """
    chosen: dict[tuple[str, int], Group] = {}
    for group in groups:
        key = group.norm, group.batch_size
        rank = len(group.mious), group.mean or 0
        if key not in chosen or rank > (len(chosen[key].mious), chosen[key].mean or 0):
            chosen[key] = group
    return list(chosen.values())


def judge(groups: Sequence[Group]) -> list[Verdict]:
    """A verdict for each batch size, of groups with one learning rate for each norm."""
    verdicts = []
    for batch in sorted({group.batch_size for group in groups}):
        own = [group for group in groups if group.batch_size == batch]
        p: dict[Pair, float] = {}
        for a, b in combinations([group for group in own if group.mious], 2):
            value = paired_p(a.mious, b.mious)
            if value is not None:
                p[frozenset((a.norm, b.norm))] = value
        corrected = dict(zip(p, holm(list(p.values())), strict=True))
        verdicts.append(Verdict(batch, own, corrected))
    return verdicts


def paired_p(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """Two-sided p-value of the paired t-test over the seeds that both have; None: too few."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < MIN_SEEDS:
        return None
    pairs: list[Any] = [[values[seed] for seed in seeds] for values in (a, b)]
    if pairs[0] == pairs[1]:
        return 1.0  # 0 / 0 otherwise
    value = float(ttest_rel(*pairs).pvalue)
    return None if math.isnan(value) else value


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several tests, raised so that all of them may be looked at (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    raised, least = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, values[i] * (len(values) - rank)))
        raised[i] = least
    return raised


def conclusion(verdict: Verdict) -> str:
    """What may be said about a batch size, in words."""
    best = verdict.best
    if best is None:
        return "No run came to its end."
    others = verdict.others()
    if not any(others.values()):
        return f"Only {best.norm} came to its end: there is nothing to compare it with."
    spread = "" if best.std is None else f" ± {best.std:.2f}"
    seeds = f"{len(best.mious)} seed{'s' * (len(best.mious) != 1)}"
    text = f"{best.norm} has the highest mIoU: {best.mean:.2f}{spread} ({seeds}). "
    untested = ", ".join(others["not tested"])
    if not others["significant"] and not others["not significant"]:
        return text + (
            f"With fewer than {MIN_SEEDS} seeds in common nothing can be concluded from that: the "
            "order may be chance."
        )
    if others["significant"]:
        text += f"It differs significantly (p < {LEVEL}) from {', '.join(others['significant'])}"
        rest = ", ".join(others["not significant"])
        text += f", not from {rest}." if rest else "."
    else:
        text += f"It does not differ significantly from {', '.join(others['not significant'])}."
    return text + (f" Not tested, for too few seeds in common: {untested}." if untested else "")
