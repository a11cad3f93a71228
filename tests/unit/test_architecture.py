"""Rules of the code base: who may import whom, sizes, torch-free settings, commands that explain themselves."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.loading import CONFIGS, load
from configs.study import load_study

ROOT = Path(__file__).parents[2]
# Each layer may import itself and these.
MAY_IMPORT = {
    "switti": set(),
    "datamodules": {"switti"},
    "lightning_modules": {"switti"},
    "callbacks": {"switti"},
    "configs": {"switti", "datamodules", "lightning_modules", "callbacks"},
    "experiments": {"switti", "datamodules", "lightning_modules", "callbacks", "configs"},
}
FOREIGN = {"switti": {"lightning", "pytorch_lightning", "omegaconf", "yaml"}}
# The report's reader of run folders reads the config.yaml that a run has saved.
ALLOWED = {(Path("switti/report/runs.py"), "yaml")}
LONGEST_FILE = 400
SOURCES = sorted(path.relative_to(ROOT) for layer in MAY_IMPORT for path in (ROOT / layer).rglob("*.py"))
COMMANDS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if '__name__ == "__main__"' in path.read_text()
)
YAMLS = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
STUDIES = [path for path in YAMLS if path.parts[0] == "studies"]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else str(node.module)


def violations(path: Path, source: str) -> list[str]:
    layer = path.parts[0]
    wrong = (set(MAY_IMPORT) - MAY_IMPORT[layer] - {layer}) | FOREIGN.get(layer, set()) | {"tests", "."}
    return [
        f"{path}:{line}: {layer} must not import {module}"
        for line, module in imports(source)
        if (module if module == "." else module.split(".")[0]) in wrong and (path, module) not in ALLOWED
    ]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


def test_the_import_rule_sees_what_it_must() -> None:
    assert violations(Path("switti/x.py"), "import torch\nfrom switti.errors import UserError\n") == []
    for path, source in [
        ("switti/x.py", "def f():\n    from lightning.pytorch import Trainer\n"),
        ("switti/x.py", "import omegaconf.errors as e\n"),
        ("switti/x.py", "from . import errors\n"),
        ("callbacks/x.py", "from datamodules.config import DataConfig\n"),
        ("configs/x.py", "import switti, experiments.command\n"),
    ]:
        assert len(violations(Path(path), source)) == 1, source


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_stay_readable(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= LONGEST_FILE


def test_settings_and_package_inits_import_no_torch() -> None:
    """Imported together in a fresh interpreter: transitively, too."""
    wanted = [
        path for path in SOURCES if path.name in ("config.py", "__init__.py") or path.stem.endswith("_config")
    ]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in wanted]
    assert "switti.models.config" in modules
    heavy = ("torch", "lightning", "transformers")
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


@pytest.mark.parametrize("path", [path for path in YAMLS if path not in STUDIES], ids=str)
def test_every_shipped_config_is_valid(path: Path) -> None:
    load(path.with_suffix(""))


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_every_shipped_study_is_valid(path: Path) -> None:
    study = load_study(path.stem)
    assert study.search is not None or len(study.runs) > 1


@pytest.mark.parametrize("path", YAMLS, ids=str)
def test_every_shipped_config_opens_with_its_description(path: Path) -> None:
    """What it is, the command that runs it, what it costs, what to expect."""
    lines = (CONFIGS / path).read_text().splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert len(header) >= 2
    if path.parts[0] in ("generator", "tokenizer", "studies"):
        assert any(
            "python -m experiments." in line or "base: " in line for line in header
        )  # run it, or build on it


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_open_with_their_command_line(command: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{command}.py").read_text())) or ""
    first = docstring.splitlines()[0]
    assert first == f"python -m experiments.{command}" or first.startswith(
        f"python -m experiments.{command} "
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves_at_once(command: str) -> None:
    """In less than a second of one core, whatever else the machine does: nothing heavy is imported for it."""
    before = processor_seconds()
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert processor_seconds() - before < 1.0


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
