"""Model cards of exported pipelines: built from a run folder and read back; hostile texts stay text."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs as maker
import yaml
from PIL import Image

from reports.model_card_facts import read_facts
from switti.errors import UserError
from switti.sampling.model_card import MetricValue, RunFacts, model_card

SETTINGS = {"model": {"depth": 2, "scales": [1, 2]}, "sampling": {"guidance": 4.0, "guidance_stop": None}}
HOSTILE = "x`|</td><script>alert(1)</script>\n---\nlicense: mit\n# [a](http://b) \x1b[31m![i](http://c/d.png)"
# As one line: without the escape sequence, and with blanks for line ends.
HOSTILE_LINE = HOSTILE.replace("\x1b[31m", "").replace("\n", " ")


def header(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def rows(card: str) -> dict[str, str]:
    """First cell → second cell of every table row."""
    cells = [re.split(r"(?<!\\)\|", line)[1:3] for line in card.splitlines() if line.startswith("|")]
    return {first.strip(): second.strip() for first, second in cells}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "ATTRIBUTION.md").write_text("Images by somebody, CC BY 4.0\n")
    config = {
        "seed": 3,
        "data": {"train": f"{data}/train-*.tar", "batch_size": 64},
        "optimizer": {"learning_rate": 1e-3},
    }
    run = maker.write_run(tmp_path / "runs" / "one", config, maker.record("one", 3))
    (run / "samples").mkdir()
    for step, colour in ((100, "red"), (2000, "blue"), (3000, "green")):
        Image.new("RGB", (8, 4), colour).save(run / "samples" / f"step_{step:06d}_guided.png")
    evaluation = {
        "step": 2000, "metrics": {"fid_alexnet": 12.5, "mini_clip_score": 0.25}, "pictures": 50,
        "captions": "validation", "settings": {"guidance": 4.0}, "sampling": None,
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def test_a_card_is_built_from_a_run_and_read_back(folder: Path) -> None:
    facts = read_facts(folder, 2000, ema=True)
    card = model_card("non_causal", SETTINGS, facts)
    assert header(card) == {
        "library_name": "switti", "pipeline_tag": "text-to-image", "license": "other",
        "license_name": "licence-of-the-training-data", "license_link": "ATTRIBUTION.md",
        "tags": ["switti", "text-to-image", "scale-wise-transformer", "next-scale-prediction", "non-causal"],
    }  # fmt: skip
    found = rows(card)
    assert found["optimizer steps"] == "`2000`" and found["optimizer.learning_rate"] == "`0.001`"
    assert found["data.batch_size"] == "`64`" and found["seed"] == "`3`"
    assert found["exported weights"] == "`EMA`"
    assert found["train"] == "`…/train-*.tar`" and str(folder.parents[1]) not in card
    assert found["model.scales"] == "`[1, 2]`" and found["sampling.guidance_stop"] == "`null`"
    assert found["FID (AlexNet) ↓"] == "`12.5`"
    assert "Never comparable with Inception FID" in card
    assert "Measured at step 2000 on 50 images of the validation captions with guidance=4.0." in card
    assert "SwittiPipeline.from_pretrained(" in card and "![Sampled images](samples.png)" in card
    assert facts.attribution == "Images by somebody, CC BY 4.0\n"
    assert facts.samples is not None and facts.samples.getpixel((0, 0)) == (0, 0, 255)


def test_a_run_without_a_record_and_no_run_at_all_have_a_card(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    facts = read_facts(tmp_path / "bare", 8, ema=False)
    assert (facts.name, facts.samples) == ("bare", None)
    assert facts.training == {"optimizer steps": 8, "exported weights": "trained"}
    card = model_card("causal", SETTINGS, RunFacts())
    assert header(card)["license"] == "unknown" and "causal" in header(card)["tags"]
    assert "# Switti: causal" in card and "## Training" not in card and "## Metrics" not in card


def test_hostile_texts_stay_text() -> None:
    facts = RunFacts(
        name=HOSTILE, training={HOSTILE: HOSTILE}, data={"train": [HOSTILE]},
        metrics=(MetricValue(HOSTILE, 1.0, HOSTILE),), evaluated=HOSTILE,
    )  # fmt: skip
    card = model_card("causal", {"model": {"name": HOSTILE}}, facts)
    plain = model_card("causal", {"model": {"name": "x"}}, RunFacts())
    assert header(card) == header(plain)
    assert "\x1b" not in card and card.count("\n---\n") == 1
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(card.split("---\n", 2)[2])
    flat = [token for block in tokens for token in (block, *(block.children or ()))]
    kinds = {token.type for token in flat}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "hr", "strong_open"}
    assert [token.content for token in flat if token.type == "code_inline"].count(HOSTILE_LINE) == 2
    heads = [flat[i + 1].content for i, token in enumerate(flat) if token.type == "heading_open"]
    assert heads[1:] == ["Use", "Data", "Licence", "Training", "Metrics", "Settings"]
    for row in card.splitlines():
        if row.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", row)) in (4, 5)


def test_unreadable_samples_are_named(folder: Path) -> None:
    path = folder / "samples" / "step_002000_guided.png"
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"step_002000_guided\.png is not a readable image"):
        read_facts(folder, 2000, ema=True)
