"""Every code block of the Markdown files: Python runs, commands are accepted by their tools."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import command_lines
import pytest
from markdown_blocks import BLOCKS, MARKERS, PAGES, ROOT, Block, inline_commands, read_blocks

import mmbcn
from mmbcn.errors import UsageError

PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]
DATA = [block for block in BLOCKS if block.language in ("json", "yaml", "toml")]
INLINE = [place for path in PAGES for place in inline_commands(path)]
_CHEAP = ("tools/print_config.py", "tools/datasets/shapes.py")  # commands that always run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in: with the repository's tools and a copy of its configs."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "work_dirs").mkdir()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unresolved(tree: ast.AST) -> list[str]:
    """Names of this package that are not there: imports, attributes of mmbcn, types in configs."""
    wrong = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.fullmatch(r"mmbcn(\.\w+)+", node.value) else []
        wrong += [n for n in names if n.split(".")[0] == "mmbcn" and not exists(n)]
    return wrong


def exists(name: str) -> bool:
    """Whether a dotted name is a module, something in one, or a type of a registry."""
    module, _, attribute = name.rpartition(".")
    if not module:
        return True
    try:
        if hasattr(importlib.import_module(module), attribute):
            return True
        importlib.import_module(name)
    except ModuleNotFoundError:
        if module != "mmbcn":
            return False
    else:
        return True
    from mmbcn import registry

    registries = [getattr(registry, r) for r in dir(registry) if r.isupper()]
    return any(hasattr(r, "get") and r.get(name) for r in registries)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_has_a_language_and_a_known_marker(block):
    assert block.language in ("python", "bash", "json", "yaml", "toml", ""), block.language
    assert block.marker in ("", *MARKERS)
    assert block.marker not in ("skip", "setup") or block.rest, f"a {block.marker} without reason"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block, place):
    pytest.importorskip("mmseg")
    tree = ast.parse(block.code)
    assert not unresolved(tree)
    if block.marker == "skip":
        return
    if block.marker == "config":
        check_config(block, place)
        return
    namespace = {"__name__": "__docs__", "mmbcn": mmbcn}
    for part in [*block.before, block]:
        if part.marker == "setup":
            exec(compile(part.rest, f"setup of {part}", "exec"), namespace)
        exec(compile("\n" * (part.line - 1) + part.code, part.page, "exec"), namespace)


def check_config(block: Block, place: Path) -> None:
    from mmengine.config import Config

    from mmbcn.engine.config_check import check_names

    path = place / (block.rest or "configs/deeplabv3/example.py")
    path.write_text(block.code)
    cfg = Config.fromfile(path)
    check_names(cfg)
    assert not unresolved(ast.parse(repr(cfg.to_dict())))


@pytest.mark.parametrize("block", [b for b in BASH if b.marker != "skip"], ids=str)
def test_commands_are_accepted(block):
    found = command_lines.commands(block.code)
    assert found
    for words in found:
        command_lines.check(words)


@pytest.mark.parametrize(("place", "text"), INLINE)
def test_commands_in_running_text_are_accepted(place, text):
    for words in command_lines.commands(text):
        command_lines.check(words)


CHEAP = [
    (str(block), words)
    for block in BASH
    if block.marker == ""
    for words in command_lines.commands(block.code)
    if words[1:] and (words[1] in _CHEAP or "--help" in words)
]


@pytest.mark.parametrize(("where", "words"), CHEAP)
def test_cheap_commands_run(where, words, place):
    pytest.importorskip("mmseg")
    if not {"CONFIG", "CHECKPOINT", "NAME"} & set(words):
        command_lines.run(ROOT / words[1], words[2:])


def run_block(block: Block, place: Path) -> None:
    """Run a block of commands as it stands."""
    python = Path(sys.executable).parent
    env = {"PATH": f"{python}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(place)}
    env |= {"OMP_NUM_THREADS": "1"}
    for part in [*block.before, block]:
        command = ["bash", "-euo", "pipefail", "-c", part.code]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BASH if b.marker in ("run", "continue")], ids=str)
def test_marked_commands_run(block, place):
    pytest.importorskip("mmseg")
    run_block(block, place)


@pytest.mark.parametrize("block", DATA, ids=str)
def test_data_parses(block):
    if block.language == "yaml":
        pytest.importorskip("yaml").safe_load(block.code)
    elif block.language == "toml":
        command_lines.read_toml(block.code)
    else:
        json.loads(block.code)


# --- the checks themselves -----------------------------------------------------------------------


def test_markers_are_read(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n<!-- doc-test: setup\nx = 1\n-->\n```python\nx + 1\n```\n\n"
        "<!-- doc-test: continue -->\n\n```python\ny = x\n```\n\n"
        "- a list\n\n  ```bash\n  ls\n  ```\n"
    )
    monkeypatch.setattr("markdown_blocks.ROOT", tmp_path)
    first, second, third = read_blocks(page)
    assert (first.marker, first.rest, first.code, first.line) == ("setup", "x = 1", "x + 1\n", 7)
    assert second.before == [first]
    assert (third.language, third.code, third.marker) == ("bash", "ls\n", "")


@pytest.mark.parametrize(
    "command",
    [
        "python tools/gone.py",
        "python tools/train.py CONFIG --nrom bcn",
        "python tools/train.py CONFIG --norm bnc",
        "python tools/train.py configs/gone.py",
        "python tools/train.py configs/deeplabv3_r101_bcn.py --cfg-options param_scheduler.9.end=1",
        "python tools/datasets/shapes.py --layout imagenet",
        "bash tools/dist_train.sh CONFIG 8 --gpus 1",
        "make coffee",
        "pip install -e '.[onedll]'",
        "mim train mmbcn deeplabv3_gone.py",
        "frobnicate --all",
    ],
)
def test_wrong_commands_are_noticed(command, capsys):
    pytest.importorskip("mmseg")
    (words,) = command_lines.commands(command)
    with pytest.raises((AssertionError, UsageError, pytest.fail.Exception)):
        command_lines.check(words)


def test_unresolved_names_are_noticed():
    pytest.importorskip("mmseg")
    code = "from mmbcn import bcn_norm\nmmbcn.nothing\nmmbcn.BCN\nx = dict(type='mmbcn.BNC')\n"
    assert {*unresolved(ast.parse(code))} == {"mmbcn.bcn_norm", "mmbcn.nothing", "mmbcn.BNC"}
    assert not unresolved(ast.parse("dict(type='mmbcn.NonFiniteHook'), mmbcn.NormRunner"))
