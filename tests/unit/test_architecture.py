"""Rules of the code base: who may import whom, sizes, torch-free settings, commands that explain themselves."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.loading import CONFIGS, load
from sweeps.study import load_study

ROOT = Path(__file__).parents[2]
# Imports run one way: each layer may import itself and these.
PARTS = {"switti", "datamodules", "lightning_modules", "callbacks"}
MAY_IMPORT: dict[str, set[str]] = {
    "switti": set(),
    "datamodules": {"switti"},
    "lightning_modules": {"switti"},
    "callbacks": {"switti"},
    "configs": PARTS,
    "sweeps": PARTS | {"configs"},
    "evaluation": PARTS | {"configs"},
    "benchmarks": PARTS | {"configs"},
    "reports": PARTS | {"configs", "sweeps", "evaluation", "benchmarks"},
    "experiments": PARTS | {"configs", "sweeps", "evaluation", "benchmarks", "reports"},
}
# Inside the library too: a package may import the ones before its own line, and the modules beside them.
RANKS = [
    {"models", "tokenizer", "losses"},
    {"weights"},
    {"text", "distributed"},
    {"metrics", "sampling"},
    {"diffusion"},
    # Protocols name types of all the others.
    {"contracts"},
]
BESIDE = {("tokenizer", "models"), ("losses", "models"), ("losses", "tokenizer")}
FOREIGN = {"switti": {"lightning", "pytorch_lightning", "omegaconf", "yaml"}}
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
        if (module if module == "." else module.split(".")[0]) in wrong
    ]


def rank(package: str) -> int:
    """Place of a package of the library in `RANKS`; -1 of its single modules."""
    return next((number for number, packages in enumerate(RANKS) if package in packages), -1)


def upward(path: Path, source: str) -> list[str]:
    """Imports of a file of the library that its package must not make."""
    if path.parts[0] != "switti" or path == Path("switti/__init__.py"):
        return []
    own = path.parts[1].removesuffix(".py")
    found = []
    for line, module in imports(source):
        names = module.split(".")
        other = names[1] if names[0] == "switti" and len(names) > 1 else ""
        if rank(other) < 0 or other == own or (own, other) in BESIDE:
            continue
        if rank(other) >= rank(own):
            found.append(f"{path}:{line}: {own or 'the library'} must not import {module}")
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Import circles: strongly connected groups of more than one module."""
    groups: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return groups


def import_graph() -> dict[str, set[str]]:
    """Module to the modules of this repository that it imports at any place, by dotted names."""
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [name for name in inner if name in modules]
                wanted += [str(node.module)] if len(wanted) < len(inner) else []
            graph[module] |= {name for name in wanted if name in modules and name != module}
    return graph


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    source = (ROOT / path).read_text()
    assert violations(path, source) + upward(path, source) == []


def test_imports_make_no_circle() -> None:
    assert circles(import_graph()) == []


def test_the_rule_of_circles_sees_them() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"]]


def test_experiments_holds_commands_and_their_shared_head_alone() -> None:
    files = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert files - set(COMMANDS) == {"__init__", "cli"}


def test_the_import_rule_sees_what_it_must() -> None:
    assert violations(Path("switti/x.py"), "import torch\nfrom switti.errors import UserError\n") == []
    for path, source in [
        ("switti/x.py", "def f():\n    from lightning.pytorch import Trainer\n"),
        ("switti/x.py", "import omegaconf.errors as e\n"),
        ("switti/x.py", "from . import errors\n"),
        ("callbacks/x.py", "from datamodules.config import DataConfig\n"),
        ("configs/x.py", "import switti, experiments.cli\n"),
        ("sweeps/x.py", "from benchmarks.flops import flops\n"),
        ("evaluation/x.py", "import reports.build\n"),
        ("switti/models/x.py", "from switti.weights.load import load_generator\n"),
        ("switti/models/x.py", "from switti.tokenizer.rqvae import RQVAE\n"),
        ("switti/weights/x.py", "def f():\n    import switti.text.base\n"),
        ("switti/files.py", "import switti.models.norm\n"),
        ("switti/sampling/x.py", "from switti.contracts import SamplingModule\n"),
    ]:
        assert len(violations(Path(path), source) + upward(Path(path), source)) == 1, source


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
    docstring = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{command}.py").read_text())) or ""
    assert done.stdout.startswith(f"usage: {docstring.splitlines()[0]}\n")
    assert processor_seconds() - before < 1.0


def test_argument_parsers_are_made_in_one_place() -> None:
    made = [path for path in SOURCES if "ArgumentParser(" in (ROOT / path).read_text()]
    assert made == [Path("experiments/cli.py")]


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
