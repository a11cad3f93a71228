"""The files around the code agree with each other."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


# What `make install` and environment.yml install beside the library's own dependencies.
EXTRAS = ("train", "embedded", "sweep", "diffusion", "docs", "dev")
# Modules called otherwise than their packages.
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch"}
# Extras whose packages are imported only when they are asked for.
OPTIONAL = ("diffusion",)


def wanted_by(project: dict) -> set[str]:
    extras = project["project"]["optional-dependencies"]
    return {*project["project"]["dependencies"], *(text for name in EXTRAS for text in extras[name])}


def declared(texts: Iterable[str]) -> set[str]:
    """Names of required packages."""
    requirements = pytest.importorskip("packaging.requirements")
    return {requirements.Requirement(text).name.lower().replace("-", "_") for text in texts}


def optional(project: dict) -> set[str]:
    extras = project["project"]["optional-dependencies"]
    return declared(text for name in OPTIONAL for text in extras[name])


def foreign(root: Path, project: dict, *layers: str) -> dict[str, Path]:
    """Package that is imported in these folders, but neither ours nor Python's → one of the files."""
    own = set(project["tool"]["ruff"]["lint"]["isort"]["known-first-party"])
    files = [path for layer in layers for path in (root / layer).rglob("*.py")]
    modules = {module.split(".")[0]: path for path in files for module in imported(path)}
    return {
        PACKAGES.get(module, module).lower(): path
        for module, path in modules.items()
        if module not in own | sys.stdlib_module_names
    }


def test_mypy_checks_every_package(project: dict) -> None:
    tools = project["tool"]
    assert set(tools["mypy"]["packages"]) == set(tools["ruff"]["lint"]["isort"]["known-first-party"])


def test_conda_and_pip_ask_for_the_same(root: Path, project: dict) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert set(pip) == wanted_by(project)
    assert f"python{project['project']['requires-python']}" in environment["dependencies"]


def test_make_installs_every_extra_that_is_worked_with(root: Path) -> None:
    assert f"'.[{','.join(EXTRAS)}]'" in (root / "Makefile").read_text()


def test_the_library_declares_what_it_imports_and_nothing_else(root: Path, project: dict) -> None:
    assert set(foreign(root, project, "switti")) - optional(project) == declared(
        project["project"]["dependencies"]
    )


def test_what_the_code_imports_is_declared(root: Path, project: dict) -> None:
    layers = project["tool"]["ruff"]["lint"]["isort"]["known-first-party"]
    wanted = declared([*wanted_by(project), *project["project"]["optional-dependencies"]["postgresql"]])
    wanted |= optional(project)
    missing = {name: path for name, path in foreign(root, project, *layers).items() if name not in wanted}
    assert not missing


def test_the_train_extra_holds_what_is_imported_and_nothing_else(root: Path, project: dict) -> None:
    layers = project["tool"]["ruff"]["lint"]["isort"]["known-first-party"]
    extras = project["project"]["optional-dependencies"]
    others = declared([*project["project"]["dependencies"], *extras["embedded"], *extras["sweep"]])
    assert declared(extras["train"]) == set(foreign(root, project, *layers)) - others - optional(project)


def test_the_pipeline_imports_nothing_of_training(root: Path, project: dict) -> None:
    """In an interpreter in which the train extra does not exist. What others of its packages use is left to them."""
    blocked = declared(project["project"]["optional-dependencies"]["train"]) - {
        "pyyaml",
        "jinja2",
        "markupsafe",
        "rich",
    }
    code = f"""
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(blocked | {"pytorch_lightning"})}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import switti.sampling.pipeline, switti.weights.load, switti.metrics.collection
"""
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


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

    for text in [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["train"]]:
        requirement = requirements.Requirement(text)
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), text


def test_make_help_lists_every_target(root: Path) -> None:
    text = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text, flags=re.MULTILINE))
    phony = {
        name for line in re.findall(r"^\.PHONY:(.*)$", text, flags=re.MULTILINE) for name in line.split()
    }
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert targets == phony
    assert set(re.findall(r"^  make ([a-z0-9-]+)", shown, flags=re.MULTILINE)) == targets
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


def test_the_package_holds_code_weights_and_their_description_alone(root: Path) -> None:
    others = {
        path.name
        for path in (root / "switti").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others == {"py.typed", "README.md", "config.json", "model.safetensors"}


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(root: Path, tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "switti", tmp_path / "switti", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks/__init__.py").touch()
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        "out",
    ]
    subprocess.run(build, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {
        str(path.relative_to(tmp_path)) for path in (tmp_path / "switti").rglob("*") if path.is_file()
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


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


# One spelling, the libraries', and plain English.
UNWANTED = re.compile(
    r"(optimi|normali|quanti|tokeni|initiali)s(?=e|i|a)|(?<!there )\b(is|are) no\b|\banew\b|given up",
    flags=re.IGNORECASE,
)


def test_the_code_has_one_spelling_and_plain_words(root: Path, project: dict) -> None:
    layers = project["tool"]["ruff"]["lint"]["isort"]["known-first-party"]
    # A log keeps what was written, a changelog what things were called.
    history = {"LOG.md", "CHANGELOG.md"}
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for folder in (*layers, "docs")
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in (".py", ".yaml", ".jinja", ".md") and path.name not in history
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNWANTED.search(line)
    ]
    assert found == []


def test_the_rule_of_words_sees_what_it_must() -> None:
    for text in (
        "The Optimiser",
        "normalised",
        "quantisation",
        "tokenising",
        "it is no tensor",
        "made anew",
        "given up",
    ):
        assert UNWANTED.search(text)
    for text in (
        "there is no such setting",
        "analysis",
        "optimizer",
        "it is not a tensor",
        "is normal",
        "renewal",
    ):
        assert not UNWANTED.search(text)
