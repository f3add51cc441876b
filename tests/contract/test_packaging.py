"""What is shipped: the wheel's content and that it works alone; the constraints; the licences."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
ASSETS = ROOT / "kandinsky_exp" / "tiny" / "assets"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither the checkout nor what an earlier build left in it plays a part."""
    copy = tmp_path_factory.mktemp("source") / "project"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "outputs", ".*")
    shutil.copytree(ROOT, copy, ignore=ignored)
    output = copy.parent / "dist"
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    (file,) = output.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_config_and_the_licences(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    config = {f"kandinsky_exp/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kandinsky_exp").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert config
    assert config | package | {"kandinsky_exp/conf/__init__.py"} == {
        name for name in names if name.startswith("kandinsky_exp/")
    }
    info = f"kandinsky_exp-{PROJECT['version']}.dist-info"
    assert {f"{info}/licenses/{file}" for file in PROJECT["license-files"]} <= names
    assert {name.split("/")[0] for name in names} == {"kandinsky_exp", "hydra_plugins", info}
    assert "hydra_plugins/kandinsky_optuna/sweeper.py" in names
    assert "kandinsky-exp = kandinsky_exp.cli:main" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()


@pytest.mark.slow
def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    # Ahead of an editable install: only what the wheel holds is found.
    code = (
        "import kandinsky_exp.cli as cli, kandinsky_exp.data.sources as sources; print(cli.__file__);"
        "print(len(sources.emoji().train)); cli.main(['--cfg', 'job', 'experiment=demo_prior'])"
    )
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=env, capture_output=True, text=True, check=True
    )
    file, pictures, *config = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert pictures == "64"
    assert "name: demo_prior" in config
    assert not list(elsewhere.iterdir())


def test_the_assets_are_small_and_licensed() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12.5e6
    assert "Microsoft" in (ASSETS / "emoji" / "LICENSE").read_text("utf-8")
    assert "MIT" in (ASSETS / "LICENSE-CLIP").read_text("utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_constraints_are_exact_and_name_no_place() -> None:
    versions = pins()
    assert versions["torch"] == "2.13.0"
    for name, version in versions.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), name
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)*((a|b|rc|\.post)[0-9]+)?", version), f"{name}=={version}"


def test_constraints_cover_all_that_is_installed() -> None:
    """The project, its groups and nox, and all that they require here, directly or not."""
    pinned = {canonicalize_name(name) for name in pins()}
    groups = [entry for group in PYPROJECT["dependency-groups"].values() for entry in group]
    todo = [Requirement(text) for text in (*PROJECT["dependencies"], *groups, "nox")]
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        assert canonicalize_name(requirement.name) in pinned, requirement.name
        todo += [needed for needed in required_by(requirement) if is_wanted(needed, requirement.extras)]


def required_by(requirement: Requirement) -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(requirement.name) or []]
    except PackageNotFoundError:  # a group or nox, not installed in this environment
        return []


def is_wanted(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def test_constraints_fit_what_the_project_asks_for() -> None:
    versions = {canonicalize_name(name): version for name, version in pins().items()}
    groups = [entry for group in PYPROJECT["dependency-groups"].values() for entry in group]
    for text in (*PROJECT["dependencies"], *groups):
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def audit_problem(report: Path) -> str | None:
    """The noxfile's, without nox, which need not be here."""
    tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "audit_problem"]
    names = {"json": json, "Path": Path}
    exec(compile(tree, "noxfile.py", "exec"), names)
    return names["audit_problem"](report)


FOUND = {"name": "torch", "version": "2.13.0", "vulns": [{"id": "CVE-1"}]}
FINE = {"name": "rich", "version": "15.0.0", "vulns": []}
SKIPPED = {"name": "numpy", "skip_reason": "Dependency not found"}  # pip-audit exits with 0 all the same


@pytest.mark.parametrize(
    ("dependencies", "problem"),
    [
        ([FINE], None),
        ([FINE, FOUND], "Known vulnerabilities:\ntorch 2.13.0: CVE-1"),
        ([FINE, SKIPPED], "could not be asked about 1 of 2 packages, such as numpy (Dependency not found)"),
        ([], "could not be asked about 0 of 0 packages"),
        (None, "could not be asked: there is no report"),
    ],
)
def test_an_audit_that_learned_nothing_does_not_pass(
    dependencies: list | None, problem: str | None, tmp_path: Path
) -> None:
    report = tmp_path / "audit.json"
    if dependencies is not None:
        report.write_text(json.dumps({"dependencies": dependencies, "fixes": []}))
    found = audit_problem(report)
    assert found is None if problem is None else problem in str(found)


def test_the_changelog_tells_of_this_version() -> None:
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
