"""What can be wrong with a dataset."""

from typing import NamedTuple

ERRORS = (
    "no images",
    "missing image",
    "missing label",
    "label without image",
    "unreadable image",
    "unreadable label",
    "image and label differ in size",
    "label is not one channel",
    "label has more than 8 bits",
    "label values outside the classes",
    "model and dataset differ",
    "same image in two splits",
)
WARNINGS = (
    "no labels",
    "classes unknown",
    "label stored as 16 bits or more",
    "label stored with loss",
    "suspicious label",
    "uniform image",
    "same image twice",
    "classes that never occur",
    "preprocessor does not fit",
)


class Finding(NamedTuple):
    """Something wrong.

    Attributes:
        kind: one of ``ERRORS`` or ``WARNINGS``.
        path: the file; '' where it is not about one.
        text: what was expected, what came, what may be the cause.
    """

    kind: str
    path: str
    text: str = ""

    @property
    def is_error(self) -> bool:
        """Whether training or testing would fail or go wrong."""
        return self.kind in ERRORS

    def __str__(self) -> str:
        return ": ".join(part for part in (self.path, self.text) if part)
