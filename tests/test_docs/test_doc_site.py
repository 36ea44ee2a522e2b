"""The documentation site is built without a warning, and asks nobody for anything."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from browser import show
from markdown_blocks import ROOT

pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")


def build(folder, source=ROOT) -> subprocess.CompletedProcess:
    # not --quiet, with which --strict sees no warnings
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    env = dict(os.environ, NO_MKDOCS_2_WARNING="1")
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_there(site):
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert pages
    missing = [p for p in pages if not (site / p.with_suffix(".html")).is_file()]
    assert not missing


def test_faults_end_the_build(tmp_path):
    """Guards the build above: pages outside of the navigation, dead links."""
    for folder in ("docs", "mmbcn", "tools/benchmark/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "configs").mkdir()
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs/unlisted.md").write_text("[a](gone.md) [b](faq.md#nowhere)\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0
    for fault in ("unlisted.md", "'gone.md'", "'#nowhere'"):
        assert fault in done.stderr


def test_links_from_outside_docs_lead_into_the_site(site):
    home = (site / "index.html").read_text()
    assert 'href="methods.html#enorm"' in home
    assert 'href="benchmarks/index.html"' in home
    assert '<a href="configs.html">' in home
    assert 'src="norms.png"' in (site / "benchmarks/index.html").read_text()


def test_public_names_are_documented(site):
    import mmbcn
    from mmbcn import analysis, layers, ops

    text = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    documented = set(re.findall(r'id="(mmbcn[\w.]*)"', text))
    modules = (mmbcn, analysis, layers, ops)
    names = {f"{m.__name__}.{name}" for m in modules for name in m.__all__}
    in_layers = {f"mmbcn.{name}" for name in layers.__all__}  # documented there
    assert names - in_layers <= documented


def test_pages_ask_nobody_for_anything(site):
    source = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)"')
    style = re.compile(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(https?:[^"]+)"')
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not source.findall(text) + style.findall(text), page


@pytest.mark.parametrize("page", ["index.html", "api/layers.html"])
def test_page_opens_in_a_browser(site, tmp_path, page):
    shown = show(site / page, tmp_path, 1500)
    assert shown.complaints == []
    assert [url for url in shown.requests if not url.startswith("file:")] == []
    assert "md-content" in shown.dom
