"""Versions and pins agree between the files that state them; workflows, forms and wheel."""

import re
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import command_lines
import pytest
from markdown_blocks import ROOT
from packaging.requirements import Requirement

import mmbcn

yaml = pytest.importorskip("yaml")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config")


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.fixture
def project():
    return command_lines.read_toml(text("pyproject.toml"))


def load(name: str) -> dict:
    return yaml.safe_load(text(name))


def test_ruff_is_the_same_everywhere(project):
    extra = project["project"]["optional-dependencies"]["dev"]
    (version,) = [r.partition("==")[2] for r in extra if r.startswith("ruff")]
    (hook,) = load(".pre-commit-config.yaml")["repos"]
    assert hook["rev"] == f"v{version}"
    assert f"\nruff=={version}\n" in text("constraints.txt")
    assert f"pip install ruff=={version}\n" in text(".github/workflows/lint.yml")


def test_python_versions_are_the_same_everywhere(project):
    start = "Programming Language :: Python :: 3."
    stated = [c for c in project["project"]["classifiers"] if c.startswith(start)]
    versions = [c.removeprefix(start[:-2]) for c in stated]
    tests = load(".github/workflows/tests.yml")["jobs"]
    assert tests["pinned"]["strategy"]["matrix"]["python"] == versions
    assert project["project"]["requires-python"] == f">={versions[0]}"
    assert project["tool"]["ruff"]["target-version"] == "py" + versions[0].replace(".", "")
    assert f"Python {versions[0]} or later" in text("README.md")


def test_oldest_torch_is_tested(project):
    (torch,) = [r for r in project["project"]["dependencies"] if r.startswith("torch>=")]
    steps = load(".github/workflows/tests.yml")["jobs"]["oldest"]["steps"]
    assert any(f"torch=={torch.removeprefix('torch>=')}.*" in s.get("run", "") for s in steps)


def test_pins_are_within_what_the_package_allows(project):
    pins = [Requirement(line) for line in text("constraints.txt").splitlines() if line[0] != "#"]
    pinned = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(r for extra in extras for r in extra)]
    for requirement in map(Requirement, wanted):
        version = pinned.get(requirement.name)
        assert version is None or requirement.specifier.contains(version), requirement


def test_version_is_the_same_everywhere():
    assert load("CITATION.cff")["version"] == mmbcn.__version__
    assert mmbcn.__version__ in text("CHANGELOG.md")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_commands_of_workflows_are_accepted(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert any("checkout" in step.get("uses", "") for step in steps)
    for words in (w for s in steps for w in command_lines.commands(s.get("run", ""))):
        if words[0] in ("pip", "ruff"):
            command_lines.check(words)
        paths = [w for w in words if re.match(r"(?:tests|tools|mmbcn)/", w)]
        assert all((ROOT / p).exists() for p in paths), words


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_issue_form_is_one(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")


def test_environment_that_the_forms_ask_for_is_printed():
    found = re.findall(r"`(python -c .*?)`", "".join(path.read_text() for path in FORMS))
    assert len(found) == 2
    (command,) = {*found}
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'torch': " in done.stdout
    assert "'mmsegmentation': " in done.stdout


@pytest.mark.skipif(not find_spec("hatchling"), reason="needs hatchling")
def test_wheel_has_what_mim_and_type_checkers_look_for(tmp_path):
    command = ["pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob(f"mmbcn-{mmbcn.__version__}-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("mmbcn/py.typed", "mmbcn/.mim/model-index.yml", "mmbcn/.mim/tools/train.py"):
        assert name in names
    source = {f"mmbcn/.mim/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.py")}
    assert source <= names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "mmbcn").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
