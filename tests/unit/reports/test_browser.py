"""The page in headless Chromium, on a phone and on a desktop: no complaint, nothing wider than the screen."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs as maker
from PIL import Image

from experiments import compare
from reports.tokenizer_page import Shown, write_page
from switti.metrics.tokenizer_quality import TokenizerReport

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr --dump-dom"
)
# Runs in the outer page: what the inner one, in a frame of the screen's width, looks like.
PROBE = """
<!DOCTYPE html><title>waiting</title>
<iframe style="width:WIDTHpx;height:900px" src="index.html"></iframe>
<script>onload = () => {
  const page = document.querySelector('iframe').contentDocument, root = page.documentElement;
  const all = (query) => [...page.querySelectorAll(query)];
  const fontSize = (text) => {
    const svg = text.closest('svg');
    const shrunk = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return parseFloat(getComputedStyle(text).fontSize) * shrunk;
  };
  document.title = JSON.stringify({
    scroll: root.scrollWidth, client: root.clientWidth, plots: all('svg').length,
    wide: all('.table').filter((table) => table.scrollWidth > table.clientWidth).length,
    smallest: Math.min(...all('svg text').map(fontSize)),
    plot: all('svg')[0]?.getBoundingClientRect().bottom, image: all('img')[0].getBoundingClientRect().bottom,
    broken: all('img').filter((image) => !image.naturalWidth).length,
    unnamed: all('img').filter((image) => !image.alt).length
      + all('.panel').filter((panel) => !panel.getAttribute('aria-label')).length,
  });
}</script>
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser found (looked for {', '.join(NAMES)})"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = maker.write_study(tmp_path_factory.mktemp("runs"), seeds=(0, 1, 2), sides=[1, 2, 4])
    compare.main([str(study)])
    return study / "report" / "index.html"


def look(page: str, folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """(what the probe found, what the browser wrote)."""
    (folder / "index.html").write_text(page)
    (folder / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    command = [
        str(BROWSER),
        *FLAGS.split(),
        f"--user-data-dir={folder / 'profile'}",
        str(folder / "probe.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    return json.loads(title[1]), done.stderr


@pytest.mark.parametrize("width", [390, 1440])
def test_browser_has_no_complaint(page: Path, tmp_path: Path, width: int) -> None:
    found, log = look(page.read_text(), tmp_path, width)
    assert "CONSOLE" not in log
    assert found["scroll"] <= found["client"] <= width
    assert found["plots"] == 19 and found["broken"] == found["unnamed"] == 0
    assert found["smallest"] > 9.5  # pixels
    assert width > 390 or found["wide"] == 0  # a phone shows tables as cards
    assert max(found["plot"], found["image"]) < 1700  # within two screens of a phone


def test_many_variants_leave_the_first_images_on_the_second_screen(tmp_path: Path) -> None:
    for depth in range(9):
        for seed in (0, 1):
            name = f"depth={depth},seed={seed}"
            config = maker.config("causal", seed, name, [1, 2])
            config["model"]["depth"] = depth
            points, evaluation = (make("causal", seed, [1, 2]) for make in (maker.curves, maker.evaluation))
            points = [
                (step, metric, value * (1 + depth / 50)) for step, metric, value in points if step % 500 == 0
            ]
            run = maker.write_run(tmp_path / "s" / name, config, maker.record(name, seed), points, evaluation)
            maker.write_samples(run, maker.PROMPTS, [0, 1, 2, 3])
    compare.main([str(tmp_path / "s")])
    found, log = look((tmp_path / "s" / "report" / "index.html").read_text(), tmp_path, 390)
    assert "CONSOLE" not in log and found["scroll"] <= 390
    assert found["plot"] < found["image"] < 1700


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext (poppler-utils) is not there")
def test_on_paper_every_cell_and_closed_section_is_printed(page: Path, tmp_path: Path) -> None:
    command = [
        str(BROWSER),
        *FLAGS.replace("--dump-dom", "--no-pdf-header-footer").split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--print-to-pdf={tmp_path / 'page.pdf'}",
        page.as_uri(),
    ]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    done = subprocess.run(
        ["pdftotext", "-raw", str(tmp_path / "page.pdf"), "-"], capture_output=True, text=True, check=True
    )
    printed = "".join(done.stdout.split())
    command = ["pdftotext", "-bbox", str(tmp_path / "page.pdf"), "-"]
    boxes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paper = float(re.search(r'<page width="([\d.]+)"', boxes)[1])
    ends = [float(end) for end in re.findall(r'xMax="([\d.]+)"', boxes)]
    assert 590 < paper < 600 and len(ends) > 1000 and max(ends) < paper
    cells = re.findall(r'<td role="cell"[^>]*>(?:<code>)?(.*?)(?:</code>)?</td>', page.read_text())
    assert len(cells) > 200
    assert [cell for cell in cells if "".join(unescape(cell).split()) not in printed] == []
    for seed in (0, 1, 2):
        assert f"Runswithseed{seed}" in printed
    # Images of seeds 1 and 2 are in sections that are closed on the screen.
    assert printed.count("redapple,twemojistyle·imageseed0") == 1 + 3


def test_the_probe_sees_what_is_wrong(page: Path, tmp_path: Path) -> None:
    faults = (
        '<script>console.error("bad")</script><img src="data:,"><div style="width:2000px">wide</div></body>'
    )
    found, log = look(page.read_text().replace("</body>", faults), tmp_path, 390)
    assert "CONSOLE" in log and found["scroll"] >= 2000 and found["broken"] == found["unnamed"] == 1


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of tokenizers whose names are as long as run folders' names may be."""
    names = ["embedded:demo", "decoder_tuned," + 8 * "with_a_long_name,", 'we<b>ird& "x', "a", "b", "c"]
    report = TokenizerReport({"psnr": 20.7}, {"perplexity": [9.5, 441.6]}, [{"psnr": 20.7}])
    image = Image.new("RGB", (64, 64), "red")
    cells = [("original", "a" * 99, image), *((name, f"{name} 20.7 dB", image) for name in names)]
    path = tmp_path_factory.mktemp("tokenizers") / "page.html"
    write_page(path, dict.fromkeys(names, report), [Shown("validation/" + "k" * 200, cells)], ["<b>12</b>"])
    return path.read_text()


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_a_page_of_tokenizers_is_no_wider_than_the_screen(
    tokenizers: str, tmp_path: Path, width: int
) -> None:
    found, log = look(tokenizers, tmp_path, width)
    assert "CONSOLE" not in log
    assert found["scroll"] <= found["client"] <= width
    assert found["broken"] == found["unnamed"] == 0
    assert width > 390 or found["wide"] == 0  # cards: each number stands below its tokenizer's name
