"""Checks command lines of the documentation without running what they start.

A Python tool is run up to the end of its own ``parse_args``: it has to exist and to accept the
options. Words in capitals stand for what the reader fills in.
"""

import argparse
import ast
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_NUMBERS = ("N", "GPUS", "BATCH", "PORT", "SECS")  # placeholders of numbers
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_CONFIG = re.compile(r"configs/[\w./-]+\.py")
# what each launcher's script does with its arguments: the tool, and where they go
_LAUNCHERS = {
    "tools/dist_train.sh": ("tools/train.py", lambda a: [a[0], *a[2:]]),
    "tools/dist_test.sh": ("tools/test.py", lambda a: [*a[:2], *a[3:]]),
    "tools/slurm_train.sh": ("tools/train.py", lambda a: a[2:]),
}
_MODULES = {"mmsegmentation": "mmseg", "mmdetection": "mmdet"}  # where the name is another
_SHELL = ("cd", "export", "git", "ls", "source", "test")  # not ours to check


class _ParsedError(Exception):
    """Ends a tool once its arguments are parsed."""


def commands(code: str) -> list[list[str]]:
    """The commands of a block as words: without comments, assignments and optional brackets."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\|\||\|)\s", line):
            words = shlex.split(part, comments=True)
            words = [w if "=" in w else w.removeprefix("[") for w in words]
            words = [w.removesuffix("]") if "[" not in w else w for w in words]
            words = ["1" if w in _NUMBERS else w for w in words if w not in ("...", "")]
            while words and _ASSIGNMENT.match(words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def check(words: list[str]) -> None:
    """Fail with a reason unless the command can be given as it stands."""
    head, *rest = words
    if head.rpartition("/")[2] in ("python", "python3"):
        _check_python(rest)
    elif head == "bash" or head in _LAUNCHERS:
        script, *args = rest if head == "bash" else words
        assert (ROOT / script).is_file(), f"there is no {script}"
        if script in _LAUNCHERS:
            tool, reorder = _LAUNCHERS[script]
            parse(ROOT / tool, reorder(args))
    elif head == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"the Makefile has no {set(rest) - set(targets)}"
    elif head == "pip":
        _check_pip(rest)
    elif head == "mim":
        _check_mim(rest)
    elif head in ("ruff", "pre-commit", "pytest"):
        for word in rest:
            if word.endswith(".py") or "/" in word:
                assert (ROOT / word.partition("::")[0]).exists(), f"there is no {word}"
    else:
        assert head in _SHELL, f"no check knows the command {head!r}; see tests/test_docs"


def _check_python(args: list[str]) -> None:
    first, *rest = args
    if first == "-m":
        if rest[0] in ("pip", "pytest"):
            check(rest)
        else:
            assert find_spec(rest[0]), f"there is no module {rest[0]}"
    elif first == "-c":
        ast.parse(rest[0])
    else:
        assert (ROOT / first).is_file(), f"there is no {first}"
        parse(ROOT / first, rest)


def _check_pip(args: list[str]) -> None:
    project = read_toml((ROOT / "pyproject.toml").read_text())["project"]
    for word in args:
        extras = re.fullmatch(r"(?:\.|mmbcn)\[(.*)\]?", word)
        if extras:
            wanted = set(extras[1].rstrip("]").split(","))
            known = set(project["optional-dependencies"])
            assert wanted <= known, f"pyproject.toml has no extra {wanted - known}"
    if "-c" in args:
        assert (ROOT / args[args.index("-c") + 1]).is_file()


def _check_mim(args: list[str]) -> None:
    kind, package, *rest = args
    assert kind in ("train", "test"), f"mim {kind}"
    if package == "mmbcn":
        found = list((ROOT / "configs").rglob(rest[0]))
        assert len(found) == 1, f"mim finds {len(found)} configs {rest[0]}"
        parse(ROOT / f"tools/{kind}.py", rest)
    else:
        spec = find_spec(_MODULES.get(package, package))
        if spec:  # else it is not installed, and nothing is known of its tools
            parse(Path(spec.origin).parent / f".mim/tools/{kind}.py", rest)


def parse(script: Path, args: list[str]) -> None:
    """Run a tool until its arguments are parsed; apply them to the config where there is one."""
    for word in args:
        if _CONFIG.fullmatch(word) and "NAME" not in word:
            assert (ROOT / word).is_file(), f"there is no {word}"
    parsed = run(script, args, only_parse=True)
    if not script.is_relative_to(ROOT / "tools") or "benchmark" in script.parts:
        return
    from mmbcn import norm_names

    norm = getattr(parsed, "norm", None) or ""
    norms = {norm, *str(getattr(parsed, "norms", "")).split(",")}
    wrong = {name for name in norms if re.fullmatch(r"[a-z_]+", name)} - {*norm_names()}
    assert not wrong, f"unknown norms {wrong}"
    config = getattr(parsed, "config", None)
    fixed = isinstance(config, str) and _CONFIG.fullmatch(config) and not norm.isupper()
    if fixed and (ROOT / config).is_file():
        runpy.run_path(str(ROOT / "tools/_common.py"))["read_config"](parsed)


def read_toml(text: str) -> dict[str, Any]:
    """The content of a TOML file; skips where Python has no reader of it (3.10)."""
    return pytest.importorskip("tomllib").loads(text)


def run(script: Path, args: list[str], only_parse: bool = False) -> argparse.Namespace | None:
    """Run a tool in this process.

    Args:
        script: its file.
        args: its arguments.
        only_parse: end once they are parsed, and return them.
    """
    if script.is_relative_to(ROOT / "tools") and "mmseg" not in sys.modules:
        pytest.importorskip("mmseg")
    result = None

    def parse_and_stop(self, *a, **k):
        nonlocal result
        result = original(self, *a, **k)
        raise _ParsedError

    original = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT) if only_parse else None
        patch.setattr(sys, "argv", [str(script), *args])
        patch.syspath_prepend(script.parent)
        if script.is_relative_to(ROOT / "tools"):
            patch.syspath_prepend(ROOT / "tools")
            if "benchmark" in script.parts:
                patch.syspath_prepend(script.parent)
        patch.delitem(sys.modules, "_common", raising=False)
        if only_parse:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _ParsedError:
            pass
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{script.name} {' '.join(args)} ends with {end.code}")
        finally:
            sys.modules.pop("_common", None)
    return result
