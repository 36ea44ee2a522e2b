"""The direction of imports inside the package."""

import ast
from pathlib import Path

import pytest

import mmbcn

PACKAGE = Path(mmbcn.__file__).parent
FORBIDDEN = {
    "ops": {"registry", "layers", "norms", "models", "engine", "datasets", "checkpoints"},
    "registry.py": {"ops", "layers", "norms", "models", "engine", "datasets", "checkpoints"},
    "layers": {"norms", "models", "engine", "datasets", "checkpoints"},
    "norms.py": {"models", "engine", "datasets", "checkpoints"},
    "equalization": {"norms", "models", "engine", "datasets", "checkpoints"},
    "models": {"engine", "datasets", "checkpoints"},
    "datasets": {"engine", "models", "checkpoints"},
    "inference": {"engine", "models"},
    "checkpoints": {"engine", "models", "datasets"},
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
