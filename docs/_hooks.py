"""What mkdocs does beside docs/: pages from elsewhere in the repository, and the links to them.

The Markdown files are read on code hosts too, so their links are paths in the repository. Here they
become paths in the site; a link to what the site does not have leaves its text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = "tools/benchmark/results"
# path in the repository -> path in the site
OUTSIDE = {
    "README.md": "index.md",
    "configs/README.md": "configs.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    f"{RESULTS}/README.md": "benchmarks/index.md",
    **{
        f"{RESULTS}/{path.name}": f"benchmarks/{path.name}"
        for path in sorted((ROOT / RESULTS).iterdir())
        if path.suffix in (".md", ".png", ".csv") and path.name != "README.md"
    },
}
_SOURCES = {target: source for source, target in OUTSIDE.items()}
_FOLDER_PAGES = ("README.md", "report.html")  # what a link to a folder opens
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^ *(```|~~~)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave pages out of the navigation that are not written yet."""
    config.nav = _existing(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside docs/."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Turn links within the repository into links within the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(here, f"docs/{here}"))

    def replace(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs complains
        uri = _site_path(path, files)
        if uri is None:
            return text
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(here))}{anchor})"

    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= bool(_FENCE.match(line))
        lines.append(line if fenced else _LINK.sub(replace, line))
    return "\n".join(lines)


def _site_path(path: str, files: Files) -> str | None:
    """Where the site has a file or folder of the repository."""
    options = [path, *(f"{path}/{name}" for name in _FOLDER_PAGES)]
    uris = [OUTSIDE.get(option, option.removeprefix("docs/")) for option in options]
    inside = [o in OUTSIDE or o.startswith("docs/") for o in options]
    return next(
        (u for u, ok in zip(uris, inside, strict=True) if ok and files.get_file_from_path(u)), None
    )


def _existing(nav: list[Any]) -> list[Any]:
    kept = []
    for item in nav:
        title, value = next(iter(item.items())) if isinstance(item, dict) else (None, item)
        if isinstance(value, list):
            kept.append({title: _existing(value)})
        elif value in _SOURCES or (ROOT / "docs" / value).is_file():
            kept.append(item)
    return kept
