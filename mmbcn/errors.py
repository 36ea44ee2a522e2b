"""The error that a user can mend, and what to say when the mm packages are missing."""

from collections.abc import Sequence
from difflib import get_close_matches

INSTALL_HINT = (
    "{what} needs {package}. Install one of the two distributions (both provide the import names "
    "mmengine, mmcv and mmseg, so never both in one environment):\n"
    "  maintained forks: pip install 'mmbcn[onedl]'\n"
    "  classic:          pip install mmengine==0.10.7 mmcv==2.1.0 mmsegmentation==1.2.2"
)


class UsageError(ValueError):
    """A mistake in a command, a config or the data, told in one message that says what to do."""


def missing_package(what: str, package: str) -> ImportError:
    """The error for ``what`` when ``package`` is not installed, with the two ways to get it."""
    return ImportError(INSTALL_HINT.format(what=what, package=package))


def nearest(name: str, known: Sequence[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """A hint at the known name that ``name`` may have been meant to be; else a full stop."""
    swapped = [other for other in known if sorted(other.lower()) == sorted(name.lower())]
    close = swapped or get_close_matches(name, known, 1, cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else "."
