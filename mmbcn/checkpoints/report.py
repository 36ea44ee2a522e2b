"""What became of a checkpoint's entries, and whether that is enough."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_SHOWN = 4
_CLASSIFIERS = ("fc.", "head.", "classifier.", "last_linear.")  # of networks for ImageNet
BACKBONE_SHARE = 0.01  # of the backbone's parameters that may be without a match


@dataclass
class LoadReport:
    """How a checkpoint fits a model; the names are the model's.

    Args:
        source: the checkpoint's name.
        into: the model's class.
        matched: entries of the checkpoint that are loaded.
        norms: norm layers that are loaded as a whole.
        converted: what was done -> how many entries, layers or convolutions.
        missing: entries of the model that the checkpoint lacks.
        shapes: entries of another shape -> (the checkpoint's, the model's).
        left_out: entries of parts that this model is without: a classifier, or heads.
        unexpected: other entries that the model has no place for.
        surplus: those of them in parts that the model has, as of a deeper backbone.
        absent: parts of the model (heads) of which the checkpoint has nothing.
        norms_unmatched: norm layers that are not loaded as a whole, in the other parts, and those
            of the checkpoint's backbone that the model has no place for.
        backbone_unmatched: share of the backbone's parameters, or of the checkpoint's, that has no
            counterpart.
        notes: what else is to be known.
    """

    source: str
    into: str
    matched: list[str] = field(default_factory=list)
    norms: int = 0
    converted: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    norms_unmatched: list[str] = field(default_factory=list)
    backbone_unmatched: float = 0.0
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The report as a few lines; lists are cut."""
        absent = tuple(f"{part}." for part in self.absent)
        missing = [k for k in self.missing if not k.startswith(absent)] if absent else self.missing
        shapes = [f"{k} {theirs}, model {ours}" for k, (theirs, ours) in self.shapes.items()]
        converted = [f"{how} ({count})" for how, count in self.converted.items()]
        lines = [
            f"checkpoint {self.source} -> {self.into}",
            f"  matched     {len(self.matched)} entries, with {self.norms} norm layers",
            *(f"  converted   {text}" for text in converted),
            *_line("left out", self.left_out),
            *_line("no place", self.unexpected),
            *(f"  not in it   {part}: keeps its initial weights" for part in self.absent),
            *_line("missing", missing),
            *_line("other shape", shapes, "; "),
            *(f"  note        {text}" for text in self.notes),
        ]
        return "\n".join(lines)

    def problem(self, exact: bool, optional: Iterable[str] = ()) -> str | None:
        """Why this is not enough to go on with; None: it is.

        Args:
            exact: the model must compute what the checkpoint's did: nothing may be missing.
            optional: with ``exact``, parts that may be missing all the same.
        """
        found = []
        if self.norms_unmatched:
            count = len(self.norms_unmatched)
            found.append(
                f"{_count(count, 'norm layer')} not matched ({_cut(self.norms_unmatched)})"
            )
        if self.backbone_unmatched > BACKBONE_SHARE:
            found.append(f"{self.backbone_unmatched:.1%} of the backbone's parameters not matched")
        starts = tuple(f"{part}." for part in optional)
        lost = [*self.missing, *self.shapes, *self.surplus]
        lost = [k for k in lost if not k.startswith(starts)]
        if exact and lost and not found:
            found.append(f"{_count(len(lost), 'entry', 'entries')} not matched ({_cut(lost)})")
        if not self.matched:
            found = ["nothing in it belongs to this model"]
        return " and ".join(found) or None

    def hint(self) -> str:
        """What the config should perhaps say instead."""
        lost = {k.removeprefix("backbone.") for k in [*self.missing, *self.shapes]}
        spare = {k.removeprefix("backbone.") for k in self.unexpected}
        if "stem.0.weight" in lost and "conv1.weight" in spare:
            return (
                "The checkpoint's stem is one 7x7 convolution, the model's three of 3x3: "
                "model.backbone.type=ResNet. "
            )
        if spare & {"stem.0.weight", "conv1.0.weight"}:
            return (
                "The checkpoint's stem is of three 3x3 convolutions: "
                "model.backbone.type=ResNetV1c. "
            )
        if "decode_head.bottleneck.conv.weight" in lost and "aspp" in str(self.converted):
            return (
                "The authors' head is 256 wide with a 1x1 fuse: see "
                "configs/_base_/models/deeplabv3_r101_os16.py. "
            )
        if "decode_head" in self.absent and self.backbone_unmatched <= BACKBONE_SHARE:
            return "It holds a backbone only: start a training from it (load_from). "
        if any(k.startswith("layer") for k in lost | spare):
            return "Is it of another depth or width than model.backbone says? "
        return ""


def is_classifier(key: str) -> bool:
    """Whether an entry belongs to the last layer of a network for image classification."""
    return key.removeprefix("backbone.").startswith(_CLASSIFIERS)


def _line(title: str, items: list[str], separator: str = ", ") -> list[str]:
    return [f"  {title:11} {len(items)}: {_cut(items, separator)}"] if items else []


def _cut(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}..." if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
