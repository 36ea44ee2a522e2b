"""The doctor's report as text."""

from collections.abc import Iterator, Sequence

from prettytable import PrettyTable

from mmbcn.datasets.doctor.examine import Diagnosis, image_moments, preprocessor_moments
from mmbcn.datasets.doctor.findings import ERRORS, WARNINGS

_BAR = 30  # characters of the longest bar


def format_report(diagnoses: Sequence[Diagnosis], limit: int | None = None) -> str:
    """The whole report.

    Args:
        diagnoses: as of ``examine``.
        limit: number of files that are named for each kind of finding; None: all.
    """
    lines: list[str] = []
    for diagnosis in diagnoses:
        lines += [*_head(diagnosis)]
        if diagnosis.same_as is None:
            lines += [*_findings(diagnosis, limit), *_classes(diagnosis), *_statistics(diagnosis)]
        lines.append("")
    splits = sorted({diagnosis.part.split for diagnosis in diagnoses})
    if len(splits) == 1:
        lines.append(f"Only {splits[0]} was examined: images in two splits were not looked for.")
    found = [finding for diagnosis in diagnoses for finding in diagnosis.findings]
    errors = sum(finding.is_error for finding in found)
    return "\n".join([*lines, f"{errors} errors, {len(found) - errors} warnings"])


def _head(diagnosis: Diagnosis) -> Iterator[str]:
    part = diagnosis.part
    folder = (getattr(part.dataset, "data_prefix", None) or {}).get("img_path")
    where = f" in {folder}" if folder else ""
    yield f"== {part.name}: {len(part.samples)} samples of {type(part.dataset).__name__}{where}"
    if diagnosis.same_as is not None:
        yield f"the same files as {diagnosis.same_as}"


def _findings(diagnosis: Diagnosis, limit: int | None) -> Iterator[str]:
    for kind in (*ERRORS, *WARNINGS):
        found = [finding for finding in diagnosis.findings if finding.kind == kind]
        if not found:
            continue
        yield f"{'ERROR' if found[0].is_error else 'warning'}: {kind} ({len(found)})"
        yield from (f"    {finding}" for finding in found[:limit])
        if limit is not None and len(found) > limit:
            yield f"    and {len(found) - limit} more; --show-dir writes them all"


def _classes(diagnosis: Diagnosis) -> Iterator[str]:
    """The table of classes, with bars."""
    if not diagnosis.labels:
        return
    counts, ignored = diagnosis.counts, diagnosis.part.reader.ignore_index
    names = dict(enumerate(diagnosis.part.classes))
    total = max(counts.sum(), 1)
    table = PrettyTable(["label", "class", "pixels %", "images", ""], align="r")
    table.align["class"] = table.align[""] = "l"
    shown = [*names, *(v for v in range(256) if counts[v] and v not in names)]
    longest = max(counts[shown].max(), 1)
    for value in shown:
        name = names.get(value, "(ignored)" if value == ignored else "(no class)")
        bar = "█" * round(_BAR * counts[value] / longest)
        share = f"{100 * counts[value] / total:.3f}"
        table.add_row([value, name, share, diagnosis.images[value], bar])
    yield table.get_string()


def _statistics(diagnosis: Diagnosis) -> Iterator[str]:
    sizes = diagnosis.sizes
    if sizes:
        (height, width), count = max(sizes.items(), key=lambda item: item[1])
        others = f"; {len(sizes) - 1} other sizes" if len(sizes) > 1 else ""
        yield f"size (height x width): {height}x{width} in {count} images{others}"
    found, wanted = image_moments(diagnosis), preprocessor_moments(diagnosis)
    if found is None:
        return
    order = "R, G, B" if diagnosis.part.preprocessor.get("bgr_to_rgb") else "as loaded"
    yield f"images ({order}): " + _moments(found)
    if wanted is not None:
        yield "the model's preprocessor: " + _moments(wanted)


def _moments(moments: tuple[Sequence[float], Sequence[float]]) -> str:
    mean, std = (", ".join(f"{value:.2f}" for value in values) for values in moments)
    return f"mean [{mean}], std [{std}]"
