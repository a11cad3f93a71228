"""From pictures to shards: what is written, what is skipped, what is refused, and that nothing is written by halves."""

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from data_shards import png
from PIL import Image

from datamodules.prepare import prepare as preparing
from experiments.prepare import main
from switti.errors import UserError


def contents(folder: Path, split: str = "*") -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def captions(folder: Path) -> list[str]:
    return sorted(data.decode() for name, data in contents(folder).items() if name.endswith(".txt"))


def skipped(folder: Path) -> list[dict[str, str]]:
    with (folder / "skipped.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def pictures(tmp_path):
    """Eight good pictures, one without caption, one with an empty one, one damaged, one truncated."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for i in range(8):
        path = folder / ("deep" if i % 2 else ".") / f"picture.{i}.png"
        path.write_bytes(png(i, 40, 30))
        path.with_suffix(".txt").write_text(f"number {i}\n")
    for name, data in (
        ("bare", png(9)),
        ("empty", png(10)),
        ("damaged", b"x"),
        ("torn", png(11, 40, 30)[:900]),
    ):
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text(" \n" if name == "empty" else "caption")
    (folder / "bare.txt").unlink()
    return folder


def prepare(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def test_folder(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(pictures, "--out", out, "--shard-size", 3) == 0
    assert captions(out) == [f"number {i}" for i in range(8)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["skipped"] == {
        "no caption": 2,
        "corrupt image": 1,
        "not an image": 1,
    }
    assert [row["file"] for row in skipped(out)] == ["bare.png", "damaged.png", "empty.png", "torn.png"]
    assert sum(manifest["samples"].values()) == 8 and max(s["samples"] for s in manifest["shards"]) == 3
    for shard in manifest["shards"]:
        data = (out / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert "4 skipped" in capsys.readouterr().out
    originals = {path.read_bytes() for path in pictures.rglob("picture*.png")}
    assert {
        d for n, d in contents(out).items() if n.endswith("png")
    } == originals  # 30 px ≤ 512: bytes as they were


def test_size_shrinks_the_shorter_side_and_json_keeps_the_original(pictures, tmp_path):
    Image.new("RGB", (300, 100), "red").save(pictures / "wide.jpg")
    (pictures / "wide.txt").write_text("wide")
    prepare(pictures, "--out", tmp_path / "out", "--size", 20)
    found = contents(tmp_path / "out")
    wide = next(name for name in found if name.startswith("wide") and name.endswith("jpg"))
    assert Image.open(io.BytesIO(found[wide])).size == (60, 20)
    meta = json.loads(found[wide.replace(".jpg", ".json")])
    assert (meta["width"], meta["height"]) == (300, 100)
    prepare(pictures, "--out", tmp_path / "raw", "--size", 0)
    assert (pictures / "wide.jpg").read_bytes() in contents(tmp_path / "raw").values()


def test_same_again_does_nothing_and_bytes_are_reproducible(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(pictures, "--out", out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(pictures, "--out", out) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    main([str(pictures), "--out", str(tmp_path / "two"), "--workers", "2"])
    assert bytes_of(tmp_path / "two") == bytes_of(out)


def test_other_settings_or_a_changed_source_are_refused_and_nothing_is_lost(pictures, tmp_path):
    out = tmp_path / "out"
    prepare(pictures, "--out", out)
    before = bytes_of(out)
    with pytest.raises(UserError, match=r"size was 512, now 16.*another --out"):
        prepare(pictures, "--out", out, "--size", 16)
    (pictures / "picture.0.txt").write_text("something else")
    with pytest.raises(UserError, match="has changed since"):
        prepare(pictures, "--out", out)
    assert bytes_of(out) == before
    (out / "train-000000.tar").unlink()
    (pictures / "picture.0.txt").write_text("number 0\n")
    with pytest.raises(UserError, match="missing or corrupt"):
        prepare(pictures, "--out", out)


def test_foreign_shards_are_left_alone(pictures, tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"without a manifest\.json"):
        prepare(pictures, "--out", tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"mine"


def test_failure_on_the_way_leaves_nothing(pictures, tmp_path, monkeypatch):
    def full(work, manifest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        prepare(pictures, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_while_publishing_is_finished_by_the_same_command(pictures, tmp_path, monkeypatch):
    prepare(pictures, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "publish", lambda out: None)  # as if killed before the first rename
        prepare(pictures, "--out", out)
    assert not list(out.glob("*.tar"))
    (out / ".preparing" / "train-000000.tar").rename(out / "train-000000.tar")  # …or after it
    monkeypatch.setattr(preparing, "_write_all", lambda *_: pytest.fail("written again"))
    assert prepare(pictures, "--out", out) == 0
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_killed_while_writing_starts_again(pictures, tmp_path):
    work = tmp_path / "out" / ".preparing"
    work.mkdir(parents=True)
    (work / "train-000000.tar").write_bytes(b"half")
    assert prepare(pictures, "--out", tmp_path / "out") == 0
    assert not work.exists() and len(captions(tmp_path / "out")) == 8


def test_two_at_once(pictures, tmp_path):
    from datamodules.prepare.writer import working_folder

    with working_folder(tmp_path / "out"), pytest.raises(UserError, match="by another process"):
        prepare(pictures, "--out", tmp_path / "out")


def write_table(
    path: Path, rows: list[tuple[str, str]], names: tuple[str, str] = ("file", "caption")
) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *rows])
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables(pictures, tmp_path, suffix):
    # Separated tables begin with their header.
    first = 0 if suffix == "jsonl" else 1
    rows = [
        ("picture.0.png", 'a "quoted", one'),
        ("deep/picture.1.png", "zwei – ü"),
        ("picture.0.png", "again"),
    ]
    rows += [("missing.png", "none"), ("picture.2.png", ""), ("picture.4.png", "x"), ("picture.4.png", "x")]
    table = write_table(tmp_path / f"t.{suffix}", rows, ("path", "text"))
    columns = ("--file-column", "path", "--caption-column", "text")
    prepare(table, "--out", tmp_path / "out", "--images", pictures, *columns)
    assert captions(tmp_path / "out") == sorted(['a "quoted", one', "zwei – ü", "again", "x"])
    assert {(row["file"], row["row"], row["reason"]) for row in skipped(tmp_path / "out")} == {
        ("missing.png", f"line {4 + first}", "no such file"),
        ("picture.2.png", f"line {5 + first}", "no caption"),
        ("picture.4.png", f"line {7 + first}", "listed twice with one caption"),
    }
    with pytest.raises(UserError, match=r"no column 'file'.*it has path, text"):
        prepare(table, "--out", tmp_path / "other", "--images", pictures)


def test_coco(pictures, tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "picture.0.png"}, {"id": 2, "file_name": "picture.2.png"}],
        "annotations": [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "uno"}],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    prepare(path, "--out", tmp_path / "out", "--images", pictures)
    found = contents(tmp_path / "out")
    assert captions(tmp_path / "out") == ["one"]
    meta = next(json.loads(data) for name, data in found.items() if name.endswith("json"))
    assert meta["captions"] == ["one", "uno"]
    with pytest.raises(UserError, match="--images"):
        prepare(path, "--out", tmp_path / "other")
    path.write_text('{"images": []}')
    with pytest.raises(UserError, match="not a COCO captions file"):
        prepare(path, "--out", tmp_path / "other", "--images", pictures)


def test_nothing_usable_writes_nothing(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("a caption without a picture")
    with pytest.raises(UserError, match="no image with a caption"):
        prepare(empty, "--out", tmp_path / "out")
    (empty / "a.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no usable image"):
        prepare(empty, "--out", tmp_path / "out")
    for source in (tmp_path / "none", empty / "a.txt"):
        with pytest.raises(UserError):
            prepare(source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["emoji", "--images", "."],
        ["emoji", "--size", "0"],
        [".", "--flags"],
        [".", "--size", "-1"],
        [".", "--validation-fraction", "1"],
        [".", "--shard-size", "0"],
    ],
)
def test_values_that_cannot_be_meant(tmp_path, arguments):
    with pytest.raises(UserError, match="--"):
        prepare(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_with_two_captions_stays_in_one_split(pictures, tmp_path):
    rows = [(f"picture.{i}.png", f"{word} {i}") for i in (0, 2, 4, 6) for word in "abcdefgh"]
    table = write_table(pictures / "t.csv", rows)
    prepare(table, "--out", tmp_path / "out", "--validation-fraction", 0.5)
    splits = {}
    for split in ("train", "validation"):
        metas = [d for n, d in contents(tmp_path / "out", split).items() if n.endswith("json")]
        splits[split] = {json.loads(meta)["source"] for meta in metas}
    assert splits["train"] and splits["validation"] and not splits["train"] & splits["validation"]
