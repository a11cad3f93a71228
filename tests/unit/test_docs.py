"""Documentation agrees with the tree: links, anchors, files, commands, flags, configs and settings exist."""

import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

import switti
from configs.loading import SETTINGS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
        *(ROOT / "switti").rglob("*.md"),
        *(ROOT / "tests").rglob("*.md"),
    )
)
CURRENT = [path for path in PAGES if path.name not in ("CHANGELOG.md", "LOG.md")]
COMMANDS = {
    path.stem for path in (ROOT / "experiments").glob("*.py") if '__name__ == "__main__"' in path.read_text()
}
FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """Markdown without fenced blocks and code spans, in which brackets are not links."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page (path from the root) that lead to no file or heading of this repository."""
    broken = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = ROOT / page.parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def command_lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """(command, its words) of every command line in code: `python -m experiments.train …`, in spans `train …`, too.

    Lines that begin with a prompt are transcripts, also of mistakes.
    """
    blocks = [block.replace("\\\n", " ") for block in FENCE.findall(text)]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    spans = [
        f"-m experiments.{span}" if span.split()[0] in COMMANDS and " " in span else span for span in spans
    ]
    for line in (line for code in (*blocks, *spans) for line in code.splitlines()):
        found = re.search(r"-m experiments\.([\w.]+)(.*)", line)
        if found and not line.startswith("$ "):
            yield found[1], words_of(found[2])


def words_of(text: str) -> list[str]:
    """Words as a shell reads them, up to the next command; of a line that is cut within quotes, by blanks."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        words = text.split()
    ends = [number for number, word in enumerate(words) if word in ("&&", "|", "-m")]
    return words[: min(ends, default=len(words))]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page, (ROOT / page).read_text()) == []


def test_the_rule_of_links_sees_what_is_broken() -> None:
    text = "[a](index.md) [b](none.md) [c](data.md#nowhere) ![d](figures/none.png) [e](#f) `[g](h)`\n# F\n"
    assert broken_links(Path("docs/x.md"), text.replace("(#f)", "(index.md#f)")) == [
        "none.md", "data.md#nowhere", "figures/none.png", "index.md#f",
    ]  # fmt: skip


@pytest.mark.parametrize("page", [path for path in CURRENT if path.parts[0] == "docs"], ids=str)
def test_files_that_the_docs_name_exist(page: Path) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", (ROOT / page).read_text())
    tops = {path.name for path in ROOT.iterdir()} - {"runs", "data", "evaluation"}
    ours = {name for name in named if name.split("/")[0] in tops}
    assert {name for name in ours if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("guidance schedule", "switti/sampling/guidance.py"),
        ("writes `metrics.csv`", "callbacks/csv_logger.py"),
        ("causal mask", "switti/models/attention.py"),
        ("a metric", "switti/metrics/catalogue.py"),
    ],
)
def test_one_row_of_the_architecture_page_leads_to_the_file(wanted: str, file: str) -> None:
    rows = [
        line.split("|")[1:3]
        for line in (ROOT / "docs/architecture.md").read_text().splitlines()
        if line.startswith("|")
    ]
    (found,) = [cells[1] for cells in rows if wanted in cells[0]]
    assert file in found


@pytest.mark.parametrize("page", CURRENT, ids=str)
def test_commands_in_documents_exist_with_their_flags(page: Path) -> None:
    for command, words in command_lines((ROOT / page).read_text()):
        module = ROOT / "experiments" / (command.replace(".", "/") + ".py")
        assert module.is_file(), command
        source = module.read_text()
        for flag in (word for word in words if re.match("--[a-z]", word)):
            assert f'"{flag}"' in source or flag == "--help", f"{command} has no {flag}"


@pytest.mark.parametrize("page", CURRENT, ids=str)
def test_configs_and_settings_in_documents_exist(page: Path) -> None:
    groups = {name.split(".")[0] for name in SETTINGS if "." in name}
    for command, words in command_lines((ROOT / page).read_text()):
        for word in words:
            if command in ("train", "plan") and re.fullmatch(r"(generator|tokenizer)/[\w/]+", word):
                assert (ROOT / "configs" / f"{word}.yaml").is_file(), word
            name = word.partition("=")[0].removeprefix("vary.")
            if "=" in word and "/" not in name and "." in name and name.split(".")[0] in groups:
                assert name in SETTINGS, word


@pytest.mark.parametrize("page", CURRENT, ids=str)
def test_settings_that_documents_name_exist(page: Path) -> None:
    groups = {name.split(".")[0] for name in SETTINGS if "." in name} - {"metrics"}
    text = FENCE.sub("", (ROOT / page).read_text())
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)[=:` ]", text)
    settings = {name for name in named if name.split(".")[0] in groups and not name.endswith(".safetensors")}
    assert settings <= SETTINGS.keys()


def test_command_lines_are_found_in_blocks_and_spans() -> None:
    text = """`sample RUN "a b" --n 8`, `data`, `python -m experiments.bench`
```bash
python -m experiments.sweep base=x \\
  vary.seed=[0,1] && python -m experiments.train y   # not --this
$ python -m experiments.train wrong
```
"""
    assert sorted(command_lines(text)) == [
        ("bench", []),
        ("sample", ["RUN", "a b", "--n", "8"]),
        ("sweep", ["base=x", "vary.seed=[0,1]"]),
    ]


def test_the_commands_page_has_every_command() -> None:
    listed = re.findall(r"^\| `([a-z_]+)", (ROOT / "docs/commands.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_the_reference_names_what_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        if attribute[0].isupper():
            assert hasattr(importlib.import_module(module), attribute), name
        else:
            importlib.import_module(name)


def test_the_site_shows_every_page() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    shown = [page for entry in nav for page in entry.values()]
    assert sorted(shown) == sorted(str(path.relative_to("docs")) for path in PAGES if path.parts[0] == "docs")


def test_the_readme_is_short_and_opens_with_a_picture() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("![") for line in lines[:10])


def test_the_figure_is_drawn_by_its_script(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs/figures/draw_attention.py"))["main"](tmp_path / "attention.png")
    with (
        Image.open(tmp_path / "attention.png") as drawn,
        Image.open(ROOT / "docs/figures/attention.png") as shipped,
    ):
        assert drawn.size == shipped.size


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", switti.__version__)
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])


def test_every_study_folder_has_a_readme() -> None:
    folders = [path for path in (ROOT / "experiments/studies").iterdir() if path.is_dir()]
    assert folders
    assert all((folder / "README.md").is_file() for folder in folders)
