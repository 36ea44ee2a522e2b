"""Finds the images and videos that a user means, and gives each a name of its own for results."""

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from mmbcn.errors import UsageError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


class Source(NamedTuple):
    """An input file.

    Attributes:
        path: absolute, without links.
        inside: its path inside of the folder that was given, or that it lies in.
    """

    path: Path
    inside: Path

    @property
    def is_video(self) -> bool:
        """Whether its name is one of a video."""
        return self.path.suffix.lower() in VIDEOS


def find_sources(inputs: Sequence[str], out: Path) -> list[Source]:
    """The files of the inputs, each once, in order.

    Args:
        inputs: files, folders (searched to their depths for images and videos), and patterns with
            ``*``, ``?``, ``[...]`` and ``**``.
        out: the folder of results, which is not searched.

    Raises:
        UsageError: an input does not exist, matches nothing, or is a folder without images.
    """
    out = out.resolve()
    found: dict[Path, Source] = {}
    for text in inputs:
        before = len(found)
        again = False
        for path, root in _expand(text):
            resolved = path.resolve()
            again |= resolved in found
            if out not in resolved.parents:
                found.setdefault(resolved, Source(resolved, path.relative_to(root)))
        if len(found) == before and not again:
            raise UsageError(
                f"no image or video in {text}: looked for files that end in "
                f"{', '.join(IMAGES + VIDEOS)}"
            )
    return list(found.values())


def _expand(text: str) -> Iterator[tuple[Path, Path]]:
    """Files, each with the folder that its name counts from."""
    path = Path(text).expanduser()
    if path.is_dir():
        yield from _inside(path, path)
    elif path.exists():
        yield path, path.parent
    elif glob.has_magic(text):
        fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        root = Path(*path.parts[:fixed])
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (** and absolute)
        if not matches:
            raise UsageError(f"no file matches {text}")
        for match in map(Path, matches):
            if match.is_file():
                yield match, root
            elif "**" not in text:
                yield from _inside(match, root)
    else:
        raise UsageError(f"there is no file or folder {text}")


def _inside(folder: Path, root: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGES + VIDEOS and path.is_file():
            yield path, root


def name_sources(sources: Sequence[Source], known: Mapping[str, str]) -> dict[str, Source]:
    """A name of its own for each source, such as ``street/0001``, or ``clip.mp4`` for a video.

    Its path inside of the folder; of an image without the suffix, but where two differ in it alone.
    Where results of that name would be in the way of another's, with the folders above, until they
    are not.

    Args:
        sources: different files.
        known: names that were given before, and the paths of their sources; they stay.
    """
    given = {path: name for name, path in known.items()}
    stems = Counter(source.path.with_suffix("") for source in sources)
    named: dict[str, Source] = {}
    taken = _Taken()
    for name, path in known.items():
        taken.add(_results(name, Source(Path(path), Path(path))))
    for source in sources:
        name = given.get(str(source.path))
        if name is None:
            whole = source.is_video or stems[source.path.with_suffix("")] > 1
            choice = _candidates(source, whole)
            name = next(n for n in choice if taken.leaves(_results(n, source)))
            taken.add(_results(name, source))
        named[name] = source
    return named


def overlay_video(name: str) -> str:
    """The file of a video's overlays."""
    return name if name.lower().endswith(".mp4") else f"{name}.mp4"


def _results(name: str, source: Source) -> set[PurePath]:
    """What results of a name are called; of a video's frames, their folder."""
    files = (name, overlay_video(name)) if source.is_video else (f"{name}.png", f"{name}.npz")
    return set(map(PurePath, files))


class _Taken:
    """Files that have names, and the folders that they lie in."""

    def __init__(self) -> None:
        self._files: set[PurePath] = set()
        self._folders: set[PurePath] = set()

    def add(self, files: set[PurePath]) -> None:
        """Take these."""
        self._files |= files
        self._folders |= _folders(files)

    def leaves(self, files: set[PurePath]) -> bool:
        """Whether no file is taken, lies in one, or has to be a folder."""
        return not ((files | _folders(files)) & self._files or files & self._folders)


def _folders(files: set[PurePath]) -> set[PurePath]:
    return {parent for file in files for parent in file.parents}


def _candidates(source: Source, whole: bool) -> Iterator[str]:
    parts = source.path.parts[1:]
    depth = len(source.inside.parts)
    for path in (source.inside, *(Path(*parts[-d:]) for d in range(depth + 1, len(parts) + 1))):
        yield (path if whole else path.with_suffix("")).as_posix()
    yield Path(*parts).as_posix()
