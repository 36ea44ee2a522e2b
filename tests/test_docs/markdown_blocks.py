"""The code blocks of the Markdown files, and the markers that say how to check them.

A marker is an HTML comment directly above a block; CONTRIBUTING.md lists them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "configs/*.md", "docs/**/*.md", "tools/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
MARKERS = ("setup", "continue", "config", "run", "skip")
_BLOCK = re.compile(
    r"(?:^[ ]*<!-- doc-test: (?P<marker>\w+)(?P<rest>.*?)-->\n\s*)?"
    r"^(?P<indent>[ ]*)(?P<fence>```|~~~)(?P<language>[^\n]*)\n(?P<code>.*?)^[ ]*(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(r"(?<!`)`((?:python tools/|make |bash tools/)[^`]*)`(?!`)")


@dataclass
class Block:
    """A block of code.

    Attributes:
        page: the file, relative to the repository.
        line: of its first line of code.
        language: as written behind the fence.
        code: its text.
        marker: one of `MARKERS`, or empty.
        rest: what the marker says behind its name: code, or a reason.
        before: the blocks of the same language above it that it continues.
    """

    page: str
    line: int
    language: str
    code: str
    marker: str
    rest: str
    before: "list[Block]"

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path: Path) -> list[Block]:
    """The blocks of a file in their order."""
    text = path.read_text()
    blocks: list[Block] = []
    for match in _BLOCK.finditer(text):
        indent = match["indent"]
        code = "".join(
            line.removeprefix(indent) for line in match["code"].splitlines(keepends=True)
        )
        marker, rest = match["marker"] or "", (match["rest"] or "").strip(" :\n")
        language = match["language"].strip()
        line = text.count("\n", 0, match.start("code")) + 1
        before = []
        if marker == "continue":
            last = [block for block in blocks if block.language == language][-1]
            before = [*last.before, last]
        page = str(path.relative_to(ROOT))
        blocks.append(Block(page, line, language, code, marker, rest, before))
    return blocks


def without_blocks(text: str) -> str:
    """A file's text without its blocks, lines kept."""
    return _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)


def inline_commands(path: Path) -> list[tuple[str, str]]:
    """Place and text of each command in running text."""
    text = without_blocks(path.read_text())
    found = []
    for match in _INLINE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append((f"{path.relative_to(ROOT)}:{line}", " ".join(match[1].split())))
    return found


BLOCKS = [block for path in PAGES for block in read_blocks(path)]
