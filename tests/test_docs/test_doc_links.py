"""Relative links and anchors of the Markdown files, as code hosts resolve them."""

import re
from itertools import pairwise

import pytest
from markdown_blocks import PAGES, ROOT, without_blocks

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.) ")


def anchors(text: str) -> set[str]:
    """What a code host calls the headings of a text."""
    found: dict[str, int] = {}
    for heading in _HEADING.findall(without_blocks(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {s if not n else f"{s}-{n}" for s, last in found.items() for n in range(last + 1)}


def faults(page) -> list[str]:
    """Links of a page that lead nowhere."""
    wrong = []
    for link in _LINK.findall(without_blocks(page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        dead = link.startswith("/") or not target.exists()
        if dead or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not faults(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lists_follow_a_blank_line(page):
    """Code hosts begin a list without one, the site's Markdown does not."""
    lines = without_blocks(page.read_text()).split("\n")
    wrong = [
        line
        for above, line in pairwise(lines)
        if _LIST_ITEM.match(line) and above.strip() and not above.startswith((" ", "-", "*", "+"))
        if not _LIST_ITEM.match(above)
    ]
    assert not wrong


def test_dead_links_are_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, `code` & more\n## Twice\n## Twice\n"
        "[a](page.md#a-title-code--more) [b](#twice-1)\n"
        "[c](gone.md) [d](#nowhere) [e](#twice-2) [f](https://example.org)\n"
        "```\n[g](no-link)\n```\n"
    )
    assert faults(page) == ["gone.md", "#nowhere", "#twice-2"]
