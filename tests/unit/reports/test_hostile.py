"""Reports of run folders made to do harm: names, captions and settings stay text, images stay below the run folder."""

import csv
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic_runs as maker
from PIL import Image

from experiments import compare
from reports.build import document
from reports.data.comparison import compare_variants
from reports.data.images import problem_of
from reports.data.runs import read_run
from reports.data.study import group
from reports.render.markdown import render
from switti.errors import UserError

HARM = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[click](https://example.org/evil)",
    "![x](https://example.org/evil.png)",
    "`` ` <b>code</b> | cell",
    "one\n\n# two\r\n- three",
    "\x1b[31mred\x1b[0m \u202egnp",
    "=cmd|' /C calc'!A0",
    "{{ 7 * 7 }} {% raw %}",
]
ALLOWED = {
    "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "p", "nav", "a", "main", "div",
    "section", "table", "caption", "thead", "tbody", "tr", "th", "td", "code", "ul", "li", "i", "figure", "dl", "dt",
    "figcaption", "details", "summary", "img", "span", "dd", "br", "svg", "defs", "g", "path", "text", "use", "rect",
    "clippath",
}  # fmt: skip


class Tags(HTMLParser):
    """Names, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_page(text: str) -> Tags:
    page = Tags(text)
    assert {tag for tag, _ in page.seen} <= ALLOWED
    for _, attributes in page.seen:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:,", "data:image/png;base64,"))
    return page


def check_markdown(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = [token for block in parser.parse(text) for token in (block, *(block.children or []))]
    assert not [token for token in tokens if token.type.startswith(("html", "link"))]
    for token in tokens:
        assert token.type != "image" or re.fullmatch(r"[\w.+-]+\.png", token.attrs["src"])
        assert token.type != "heading_open" or token.tag in ("h1", "h2")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each harm: in its folder's name, its settings, its record, its metrics' names and its captions."""
    root = tmp_path_factory.mktemp("runs") / "s"
    for i, harm in enumerate(HARM):
        name = harm.replace("/", "∕")
        config = maker.config(harm, 0, name)
        record = maker.record(
            name, 0, error=harm, status="failed", device=harm, host=harm, command=harm, commit=harm
        )
        record |= {
            "study": "`<b>s",
            "versions": {harm: harm},
            "data": {"train": {"digest": harm, "samples": harm}},
        }
        metric = "odd/" + re.sub(r"[^ -~]", "", harm)
        points = [
            (step, name, step + i / 10)
            for step in (1, 2)
            for name in (metric, "train/loss", "norms/last/max")
        ]
        evaluation = {
            "step": 2,
            "metrics": {harm: 1.0 + i, "fid": 2.0},
            "settings": {harm: i},
            "captions": harm,
            "pictures": 3,
        }
        run = maker.write_run(root / name, config, record, points, evaluation)
        maker.write_samples(run, HARM, list(range(len(HARM))))
    compare.main([str(root)])
    return root


def test_everything_stays_text_in_the_page(study: Path) -> None:
    text = (study / "report" / "index.html").read_text()
    page = check_page(text)
    words = "".join(page.words)
    assert "{{ 7 * 7 }} {% raw %}" in words and "<script>alert(1)</script>" in words
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    policy = next(a["content"] for tag, a in page.seen if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_everything_stays_text_in_markdown(study: Path) -> None:
    text = (study / "report" / "report.md").read_text()
    check_markdown(text)
    assert "\x1b" not in text and "\u202e" not in text


def test_no_cell_is_a_formula(study: Path) -> None:
    for name in ("rows.csv", "paired.csv"):
        with (study / "report" / name).open(newline="") as stream:
            rows = list(csv.reader(stream))
        assert len(rows) > 5
        for cell in (cell for row in rows for cell in row):
            if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
                float(cell)
            assert "\x1b" not in cell


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = maker.write_run(tmp_path / "s" / "x", maker.config("causal", 0, "x"), maker.record("x", 0))
    maker.write_samples(run, ["good", "bad"], [0, 1])
    return run


def point_to(run: Path, name: str) -> None:
    index = run / "samples" / "latest" / "index.json"
    content = json.loads(index.read_text())
    content["files"][1] = name
    index.write_text(json.dumps(content))


def outside(run: Path, name: str, colour: str = "#123456") -> Path:
    path = run.parents[1] / name
    Image.new("RGB", (8, 8), colour).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("absolute", "is outside of the run folder"),
        ("above", "is outside of the run folder"),
        ("link", "is outside of the run folder"),
        ("linked folder", "is outside of the run folder"),
        ("circle", "is not a file name"),
        ("null byte", "is not a file name"),
        ("too long", "cannot be read: File name too long"),
        ("text", "is not a readable image"),
        ("svg", "is not a readable image"),
        ("cut", "is not a readable image"),
        ("eps", "is not a readable image"),
        ("bomb", "pixels, too many for a sample"),
        ("fifo", "is a FIFO, not a regular file"),
        ("folder", "is a folder, not a regular file"),
        ("device", "is outside of the run folder"),
    ],
)
def test_only_images_below_the_run_folder_are_shown(run: Path, kind: str, reason: str) -> None:
    latest = run / "samples" / "latest"
    target = latest / "01.png"
    secret = outside(run, "secret.png")
    if kind == "absolute":
        point_to(run, str(secret))
    elif kind == "above":
        point_to(run, "../../../../secret.png")
    elif kind == "null byte":
        point_to(run, "a\0b.png")
    elif kind == "too long":
        point_to(run, "x" * 300)
    elif kind == "linked folder":
        (latest / "way").symlink_to(secret.parent)
        point_to(run, "way/secret.png")
    else:
        target.unlink()
        if kind == "link":
            target.symlink_to(secret)
        elif kind == "circle":
            target.symlink_to(target)
        elif kind == "device":
            target.symlink_to("/dev/zero")
        elif kind == "text":
            target.write_text("no image")
        elif kind == "svg":
            target.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
        elif kind == "cut":
            target.write_bytes(secret.read_bytes()[:-40])
        elif kind == "eps":
            Image.new("RGB", (8, 8)).save(target, "EPS")
        elif kind == "bomb":
            Image.new("1", (1, 1 << 25)).save(target, "PNG")
        elif kind == "fifo":
            os.mkfifo(target)
        elif kind == "folder":
            target.mkdir()
    good, bad = read_run(run).samples.files
    assert problem_of(good, run) is None
    assert reason in problem_of(bad, run)


def test_what_is_not_shown_is_said(run: Path) -> None:
    outside(run, "secret.png")
    point_to(run, "../../../../secret.png")
    compare.main([str(run)])
    page = check_page((run / "report" / "index.html").read_text())
    assert sum(tag == "img" for tag, _ in page.seen) == 1 + 1  # in the head and in its section
    words = "".join(page.words)
    assert "no file" in words and "Not shown – x: secret.png is outside of the run folder." in words
    check_markdown((run / "report" / "report.md").read_text())


ODD = [None, [], {}, "x", -1, 1e400, float("nan"), 10**400, True, [1], {"a": [1]}, 1e308, "-5", [[1]]]


@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{value if value != 10**400 else 'huge'}")
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config", "seed"),
        ("config", "model.scales"),
        ("config", "tokenizer.scales"),
        ("config", "tokenizer.multipliers"),
        ("config", "metrics.prompts"),
        ("evaluation.json", "step"),
        ("evaluation.json", "pictures"),
        ("evaluation.json", "metrics.fid_alexnet"),
        ("evaluation.json", "sampling.guidance_stop"),
        ("evaluation.json", "sampling.seconds_per_scale"),
        ("samples/latest/index.json", "step"),
        ("samples/latest/index.json", "sampling.guidance"),
    ],
)
def test_odd_values_are_shown_or_refused_in_a_line(
    tmp_path: Path, file: str, key: str, value: object
) -> None:
    """Nothing but a UserError comes of a value of another kind; the other run keeps its page."""
    for name in ("causal", "non_causal"):
        config = maker.config(name, 0, name, [1, 2]) | {"metrics": {}}
        evaluation = maker.evaluation(name, 0, [1, 2])
        points = [(step, "validation/loss", 1.0 / step) for step in (1, 2)]
        content = {"config": config, "evaluation.json": evaluation}.get(file)
        if name == "causal" and content is not None:
            put(content, key, value)
        run = maker.write_run(tmp_path / "s" / name, config, maker.record(name, 0), points, evaluation)
        maker.write_samples(run, ["a"], [0])
        if name == "causal" and content is None:
            content = json.loads((run / file).read_text())
            put(content, key, value)
            (run / file).write_text(json.dumps(content))
    runs = []
    for path in sorted((tmp_path / "s").iterdir()):
        with suppress(UserError):
            runs.append(read_run(path))
    assert tmp_path / "s" / "non_causal" in [run.path for run in runs]
    with suppress(UserError):
        page = document(compare_variants(group(runs)))
        assert render(page)


def put(tree: dict, key: str, value: object) -> None:
    *groups, last = key.split(".")
    for group_ in groups:
        tree = tree[group_]
    tree[last] = value


@pytest.mark.parametrize(
    "values", [(1e308, -1e308), (float("inf"), 1.0), (float("nan"), float("nan")), (0.0, 1e-320)]
)
def test_values_at_the_ends_of_the_range_are_drawn_or_left_out(
    tmp_path: Path, values: tuple[float, float]
) -> None:
    for name, value in zip(("causal", "non_causal"), values, strict=True):
        points = [
            (step, metric, value) for step in (1, 2) for metric in ("validation/loss", "norms/last/max")
        ]
        maker.write_run(tmp_path / "s" / name, maker.config(name, 0, name), maker.record(name, 0), points)
    compare.main([str(tmp_path / "s")])


def test_an_image_that_is_not_there_is_no_warning(run: Path) -> None:
    (run / "samples" / "latest" / "01.png").unlink()
    compare.main([str(run)])
    text = (run / "report" / "index.html").read_text()
    assert "no file" in text and "Not shown" not in text


def test_the_terminal_gets_no_escape_codes(tmp_path: Path) -> None:
    study = tmp_path / "\x1b[31mred"
    maker.write_run(study / "a", maker.config("causal", 0, "a"), maker.record("a", 0))
    maker.write_run(
        study / "b\x1b]0;title\x07", maker.config("causal", 1, "b"), maker.record("b", 1, format="\x1b[1m")
    )
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare", str(study)], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in done.stdout + done.stderr and "skipped" in done.stderr
    command = [sys.executable, "-m", "experiments.compare", "\x1b[31mnowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "\x1b" not in done.stderr and done.stderr.count("\n") == 1


def test_names_that_are_not_text_are_shown_with_marks(tmp_path: Path) -> None:
    study = tmp_path / "s"
    for i, name in enumerate((b"caf\xe9", b"plain")):
        maker.write_run(study / os.fsdecode(name), maker.config("causal", i, "x"), maker.record("x", i))
    compare.main([str(study)])
    assert "caf\ufffd" in (study / "report" / "index.html").read_text()


def test_a_full_disk_is_one_line(run: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    out = run.parent / "out"
    out.mkdir()
    (out / "rows.csv").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"rows\.csv is a symbolic link, not a regular file"):
        compare.main([str(run), "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["rows.csv"]


@pytest.mark.slow
def test_three_at_once_work(run: Path) -> None:
    command = [sys.executable, "-m", "experiments.compare", str(run)]
    several = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], said
    names = [path.name for path in (run / "report").iterdir()]
    assert "index.html" in names and not [name for name in names if name.endswith(".tmp")]
