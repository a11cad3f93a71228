"""The files around the code agree with each other."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def wanted_by(project: dict) -> set[str]:
    extras = project["project"]["optional-dependencies"]
    return {*project["project"]["dependencies"], *extras["embedded"], *extras["sweep"], *extras["dev"]}


def test_conda_and_pip_ask_for_the_same(root: Path, project: dict) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert set(pip) == wanted_by(project)
    assert f"python{project['project']['requires-python']}" in environment["dependencies"]


def test_what_the_code_imports_is_declared(root: Path, project: dict) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    extras = project["project"]["optional-dependencies"]
    texts = [*wanted_by(project), *extras["postgresql"]]
    declared = {requirements.Requirement(text).name.lower().replace("-", "_") for text in texts}
    own = set(project["tool"]["ruff"]["lint"]["isort"]["known-first-party"])
    names = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch"}  # modules called otherwise
    modules = {
        module.split(".")[0]: path
        for layer in own
        for path in (root / layer).rglob("*.py")
        for module in imported(path)
    }
    foreign = {names.get(module, module).lower(): path for module, path in modules.items()}
    missing = {
        name: path for name, path in foreign.items() if name not in declared | own | sys.stdlib_module_names
    }
    assert not missing


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_tested_torch_is_within_the_range(root: Path, project: dict) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    ranges = {
        item.name: item.specifier
        for item in (requirements.Requirement(text) for text in project["project"]["dependencies"])
    }
    pins = [line for line in (root / "requirements/torch.txt").read_text().splitlines() if "==" in line]
    assert len(pins) == 2
    for pin in pins:
        name, version = pin.split("==")
        assert version in ranges[name]


def test_the_installed_environment_satisfies_the_ranges(project: dict) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    from importlib import metadata

    for text in project["project"]["dependencies"]:
        requirement = requirements.Requirement(text)
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), text


def test_make_help_lists_every_target(root: Path) -> None:
    text = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, flags=re.MULTILINE))
    phony = {
        name for line in re.findall(r"^\.PHONY:(.*)$", text, flags=re.MULTILINE) for name in line.split()
    }
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert targets == phony
    assert set(re.findall(r"^  make ([a-z-]+)", shown, flags=re.MULTILINE)) == targets
    assert {"install", "lint", "test", "demo", "demo-from-scratch", "board", "clean"} <= targets


def test_only_the_library_is_packaged(root: Path, project: dict) -> None:
    setuptools = pytest.importorskip("setuptools")
    found = setuptools.find_packages(root, **project["tool"]["setuptools"]["packages"]["find"])
    assert "switti" in found
    assert all(name.split(".")[0] == "switti" for name in found)
    without_init = {path.parent for path in (root / "switti").rglob("*.py")} - {
        path.parent for path in (root / "switti").rglob("__init__.py")
    }
    assert without_init == set()


def test_markers_in_use_are_declared(root: Path, project: dict) -> None:
    declared = {text.split(":")[0] for text in project["tool"]["pytest"]["ini_options"]["markers"]}
    builtin = {"parametrize", "skipif", "skip", "xfail", "filterwarnings", "usefixtures"}
    for path in (root / "tests").rglob("*.py"):
        used = set(re.findall(r"pytest\.mark\.(\w+)", path.read_text()))
        assert used - builtin <= declared, path


def test_test_files_have_unique_names_and_no_packages(root: Path) -> None:
    names = [path.name for path in (root / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
    assert not list((root / "tests").rglob("__init__.py"))


def test_ci_fails_when_a_step_fails(root: Path) -> None:
    script = root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
