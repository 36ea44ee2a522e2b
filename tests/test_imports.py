"""The direction of imports inside the package."""

import ast
from pathlib import Path

import pytest

import mmbcn

PACKAGE = Path(mmbcn.__file__).parent
_UPPER = {"models", "engine", "datasets", "checkpoints", "inference", "deploy"}
FORBIDDEN = {
    "ops": {"registry", "layers", "norms", *_UPPER},
    "registry.py": {"ops", "layers", "norms", *_UPPER},
    "layers": {"norms", *_UPPER},
    "norms.py": _UPPER,
    "equalization": {"norms", *_UPPER},
    "models": _UPPER - {"models"},
    "datasets": _UPPER - {"datasets"},
    "checkpoints": _UPPER - {"checkpoints"},
    "inference": {"engine", "models", "deploy"},
    "deploy": {"engine", "models", "inference"},
}
MM = {"mmengine", "mmcv", "mmseg"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_run_one_way(part):
    place = PACKAGE / part
    files = [place] if place.is_file() else list(place.rglob("*.py"))
    assert files
    for path in files:
        inside = {n.split(".")[1] for n in imported(path) if n.startswith("mmbcn.")}
        assert not inside & FORBIDDEN[part], path
        if part in ("ops", "layers", "equalization"):
            assert not {n.split(".")[0] for n in imported(path)} & MM, path
