"""The page and its companions: every section is there, nothing is loaded from outside, gaps are said."""

import base64
import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import synthetic_runs as maker
from PIL import Image

from experiments import compare
from reports.data.images import data_uri
from reports.data.metric_catalogue import describe
from reports.data.statistics import spread
from reports.render.formatting import number, plus_minus
from switti.errors import UserError

SECTIONS = [
    "metrics",
    "curves",
    "norms",
    "scales",
    "cost",
    "images",
    "captions",
    "runs",
    "settings",
    "conventions",
]
VOID = {"meta", "link", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, links, alt texts and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def _note(self, tag: str, attrs: dict[str, str | None]) -> None:
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[key] for key in ("src", "href", "xlink:href") if key in attrs]
        self.alts += [attrs["alt"]] if tag == "img" else []

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = maker.write_study(tmp_path_factory.mktemp("runs"), sides=[1, 2, 4])
    compare.main([str(study)])
    return study / "report"


def test_page_is_whole_and_self_contained(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = Page(text)
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert (
        not re.search("https?:", text)
        and "script" not in page.tags
        and "@import" not in text
        and not re.search(r"url\([^#]", text)
    )
    assert page.tags.count("svg") == 19 and len(page.alts) == 4 + 16 and all(page.alts)
    assert "#0072b2" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)  # plots follow the theme


def test_captions_and_images_stand_under_their_variants(report: Path) -> None:
    page = Page((report / "index.html").read_text())
    assert page.alts[:2] == [f"{v}, image seed 0: red apple, twemoji style" for v in ("causal", "non_causal")]


def test_companions(report: Path) -> None:
    rows = list(csv.DictReader((report / "rows.csv").open()))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for variant in ("causal", "non_causal") for seed in "01"
    ]
    paired = {row["metric"]: row for row in csv.DictReader((report / "paired.csv").open())}
    fid = paired["evaluation/fid_alexnet"]
    assert (
        float(fid["mean_difference"]) == pytest.approx(-0.9)
        and fid["pairs"] == "2"
        and fid["better"] == "lower"
    )
    assert float(paired["sampling/cache_mib"]["mean_difference"]) == -310.0
    names = [
        "loss",
        "loss_by_scale",
        "accuracy_by_scale",
        "metrics",
        "norms",
        "optimization",
        "sampling_time",
    ]
    for name in names:
        assert Image.open(report / f"{name}.png").size[0] >= 800
        assert (report / f"{name}.svg").read_text().rstrip().endswith("</svg>")
        assert f"]({name}.png)" in (report / "report.md").read_text()


def test_images_come_as_a_sheet(report: Path) -> None:
    """A row a variant, a column a caption; the synthetic images of a column differ by a shift alone."""
    with Image.open(report / "images_seed_0.png") as sheet:
        assert sheet.size == (4 * 134 + 6, 2 * 156 + 6)
        discs = [sheet.crop((6, top, 134, top + 128)) for top in (22, 178)]
        red = [sum(count for count, colour in disc.getcolors() if colour == (221, 51, 51)) for disc in discs]
        assert red[0] == red[1] > 1000  # of the first caption
    text = (report / "report.md").read_text()
    assert "![Runs with seed 0](images_seed_0.png)" in text
    assert "from left to right: red apple, twemoji style (seed 0)" in text


def test_every_run_has_its_provenance(report: Path) -> None:
    text = (report / "report.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| visibility=") and "`python -m" in line]
    assert len(lines) == 4
    for line, seed in zip(lines, "0101", strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:] == [
            seed,
            "desk",
            "62 M",
            "never",
            "–",
            "clean",
            "`0123456789abcdef0123456789abcdef01234567`",
            "`python -m experiments.train configs/generator/tiny.yaml`",
        ]
    assert "Versions: lightning 2.5.0, python 3.11.9, torch 2.6.0, torchmetrics 1.9.0" in text
    assert "paired by `seed` (0, 1; 2 pairs)" in text


def test_nothing_but_a_report_is_overwritten(tmp_path: Path) -> None:
    run = maker.write_run(tmp_path / "x", maker.config("causal", 0, "x"), maker.record("x", 0))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<h1>mine</h1>")
    (tmp_path / "file").write_text("mine")
    for place, words in (("site", "is not a report"), ("file", "is a file"), ("x", "is a run's folder")):
        with pytest.raises(UserError, match=words):
            compare.main([str(run), "--out", str(tmp_path / place)])
    assert (tmp_path / "site" / "index.html").read_text() == "<h1>mine</h1>"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "record.json", "metrics.csv"}
    for _ in range(2):  # an earlier report makes way
        compare.main([str(run), "--out", str(tmp_path / "out")])


def test_runs_that_cannot_be_read_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "s"
    for i, name in enumerate(("a", "b", "other", "half", "damaged")):
        maker.write_run(study / name, maker.config("causal", i, name), maker.record(name, i))
    (study / "other" / "record.json").write_text(json.dumps(maker.record("other", 2, format=2)))
    (study / "half" / "record.json").unlink()
    (study / "damaged" / "metrics.csv").write_bytes(b"\xff\x00\n")
    (study / "empty").mkdir()
    (study / ".locks").mkdir()
    compare.main([str(study)])
    said = capsys.readouterr()
    assert said.out.startswith("2 runs, 1 variant")
    lines = said.err.splitlines()
    assert len(lines) == 4 and all(line.startswith(f"skipped {study}/") for line in lines)
    page = re.sub(r"</?code>", "", (study / "report" / "index.html").read_text())
    assert "4 run folders could not be read (see Runs)" in page
    for name in ("other", "half", "damaged", "empty"):
        assert f"{name} is skipped" in page

    before = (study / "report" / "index.html").read_bytes()
    with pytest.raises(UserError, match=r"other/record\.json has format 2; this version reads format 1"):
        compare.main([str(study / "a"), str(study / "other"), "--out", str(study / "report")])
    for name in ("a", "b"):
        (study / name / "record.json").write_text("[]")
    with pytest.raises(UserError, match=r"record\.json must hold a JSON object"):
        compare.main([str(study)])
    assert (study / "report" / "index.html").read_bytes() == before


def test_markdown_tables_have_equal_columns(report: Path) -> None:
    lines = (report / "report.md").read_text().splitlines()
    blocks, block = [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        elif block:
            blocks.append(block)
            block = []
    assert len(blocks) >= 6 and all(len(set(block)) == 1 for block in blocks)


def test_missing_pieces_name_the_command(tmp_path: Path) -> None:
    for visibility in ("causal", "non_causal"):
        record = maker.record(visibility, 0, status="running", dirty=True, ended=None)
        maker.write_run(
            tmp_path / "s" / visibility, maker.config(visibility, 0, visibility), record, [(1, "a/b", 1.0)]
        )
    compare.main([str(tmp_path / "s"), "--out", str(tmp_path / "out")])
    text = re.sub(r"</?code>", "", (tmp_path / "out" / "index.html").read_text())
    assert "python -m experiments.evaluate STUDY|RUN … makes it" in text
    assert "python -m experiments.sample RUN" in text
    assert "Preliminary: 2 runs of 2 not finished" in text
    assert "Uncommitted changes" in text and "A name that this version does not know." in text


def test_only_common_images_are_shown(tmp_path: Path) -> None:
    for visibility, prompts in (("causal", ["red", "blue"]), ("non_causal", ["blue", "<b>green & $x$</b>"])):
        run = maker.write_run(
            tmp_path / "s" / visibility, maker.config(visibility, 0, visibility), maker.record(visibility, 0)
        )
        settings = {"guidance": 4.0 if visibility == "causal" else 6.0, "top_k": 400}
        (run / "evaluation.json").write_text(
            json.dumps({"step": 1, "metrics": {"fid": 1.0}, "settings": settings})
        )
        maker.write_samples(run, prompts, [1 if prompt == "blue" else 0 for prompt in prompts])
    compare.main([str(tmp_path / "s")])
    text = (tmp_path / "s" / "report" / "index.html").read_text()
    assert [alt.rpartition(": ")[2] for alt in Page(text).alts] == ["blue", "blue"] * 2
    assert "The evaluations sampled with different settings: guidance." in text
    assert "captions or image seeds differ between variants; 1 are common and shown" in text


def test_other_scales_are_drawn_apart(tmp_path: Path) -> None:
    for i, sides in enumerate(([1, 2], [1, 3])):
        config = maker.config("causal", 0, str(i))
        config["model"]["scales"] = config["tokenizer"]["scales"] = sides
        points = [
            (s, f"validation/{kind}", 2.0)
            for s in (1, 2)
            for kind in ("loss", "loss_by_scale/0", "loss_by_scale/1")
        ]
        maker.write_run(tmp_path / "s" / str(i), config, maker.record(str(i), 0), points)
    compare.main([str(tmp_path / "s")])
    folder = tmp_path / "s" / "report"
    assert {"loss_1.png", "loss_2.png", "loss_by_scale_1.svg"} <= {path.name for path in folder.iterdir()}
    text = (folder / "index.html").read_text()
    assert (
        "have no common scale" in text
        and "Not compared – the token spaces differ (tokenizer.scales, model.scales). Variants: scales=[1, 3]"
        in text
    )


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    record = maker.record("x", 0, status="failed", error="<script>alert(1)</script>", device='"><img src=x>')
    points = [
        (1, "odd/$na<me>$", 1.0),
        (2, "odd/$na<me>$", 2.0),
        (1, "norms/last/max", 0.0),
        (2, "norms/last/max", 0.0),
    ]
    run = maker.write_run(tmp_path / "x", maker.config("causal", 0, "x"), record, points)
    compare.main([str(run)])
    page = Page((run / "report" / "index.html").read_text())
    assert "script" not in page.tags and "img" not in page.tags


def test_picture_bytes(tmp_path: Path) -> None:
    def back(uri: str) -> Image.Image:
        return Image.open(BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))

    Image.new("RGB", (64, 32), "red").save(tmp_path / "small.png")
    Image.new("RGB", (512, 256), "red").save(tmp_path / "large.png")
    assert (
        base64.b64decode(data_uri(tmp_path / "small.png").partition(",")[2])
        == (tmp_path / "small.png").read_bytes()
    )
    assert back(data_uri(tmp_path / "large.png")).size == (256, 128)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png is not a readable image"):
        data_uri(tmp_path / "broken.png")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (7.13629, "7.136"), (-0.041, "−0.04100"), (3.2e-7, "3.200e−7"), (1e16, "1.000e16"), (None, "–"),
     (12345.6, "12346"), (float("inf"), "∞"), (float("nan"), "not a number")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_deviation_sets_the_decimals() -> None:
    assert plus_minus(spread([1.0, 1.02])) == "1.010 ± 0.014"
    assert plus_minus(spread([5.0])) == "5.000"


def test_metric_dictionary() -> None:
    assert (
        describe("metrics/fid_alexnet").better == "lower"
        and "Inception" in describe("evaluation/fid_alexnet").description
    )
    assert "ViT-H-14" in describe("metrics/clip_score_ViT-H-14").title
    assert describe("validation/accuracy_by_scale/3").better == "higher"
    assert describe("metrics/mini_clip_score_shuffled").better is None
    unknown = describe("something/else")
    assert (unknown.title, unknown.better, unknown.description) == ("something/else", None, "")


def test_default_folders(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("s/a", "s/b", "t/c"))
    assert compare.default_folder([a, b]) == tmp_path / "s" / "report"
    assert compare.default_folder([a]) == a / "report"
    assert compare.default_folder([a, c]) == Path("runs/report")


def test_the_report_needs_no_torch() -> None:
    code = "import sys, experiments.compare; sys.exit('torch' in sys.modules or 'omegaconf' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tokenizer_runs(tmp_path: Path) -> None:
    for i in (0, 1):
        config = maker.config("causal", 0, str(i)) | {"loss": {"lpips": float(i)}}
        names = ("validation/psnr", "validation/lpips", "validation/perplexity_by_scale/0", "train/loss")
        points = [(step, name, 20.0 - i) for step in (1, 2) for name in names]
        maker.write_run(tmp_path / "s" / str(i), config, maker.record(str(i), 0, task="tokenizer"), points)
    compare.main([str(tmp_path / "s")])
    text = (tmp_path / "s" / "report" / "index.html").read_text()
    assert "lpips=1 against lpips=0: better in LPIPS; worse in PSNR; equal: peak memory." in text
    assert (tmp_path / "s" / "report" / "perplexity_by_scale.png").is_file()
    assert not {"norms", "scales", "captions"} & set(Page(text).ids)
