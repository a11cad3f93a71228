"""Which members make a sample, on disk and in streams: keys with dots, links, foreign, huge and damaged members."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from data_shards import png

from datamodules.shards.bad_samples import BadSample
from datamodules.shards.samples import original_size
from datamodules.shards.shard_discovery import find_shards
from datamodules.shards.stream_samples import StoredSample, stored_samples
from datamodules.shards.tar import StreamSource
from switti.errors import UserError

Entry = tuple[str, bytes] | tuple[str, bytes, bytes]
PAIR: list[Entry] = [("000.jpg", b"x"), ("000.txt", b"y")]


def make(path: Path, entries: list[Entry]) -> Path:
    """(name, data) or (name, link target, type)."""
    with tarfile.open(
        path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, data, *kind in entries:
            member = tarfile.TarInfo(name)
            if kind:
                member.type, member.linkname = kind[0], data.decode()
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def on_disk(path: Path) -> tuple[list[str], Counter[str], str]:
    """(keys, losses by kind, their reasons)."""
    found = find_shards("data.train", [str(path)], 1.0)
    losses = Counter[str]()
    for loss in found.losses:
        losses[loss.kind] += loss.samples
    return (
        [key for shard in found.shards for key in shard.keys],
        losses,
        " ".join(x.reason for x in found.losses),
    )


def streamed(path: Path) -> tuple[list[str], Counter[str], str]:
    with path.open("rb") as stream:
        found = list(stored_samples(StreamSource(stream), "a"))
    lost = [one for one in found if isinstance(one, BadSample)]
    keys = [one.key for one in found if isinstance(one, StoredSample)]
    return keys, Counter(loss.kind for loss in lost), " ".join(loss.reason for loss in lost)


CASES: dict[str, tuple[list[Entry], list[str], dict[str, int], str]] = {
    "keys with dots": (
        [(f"IMG_2023.05.{n:02}.{kind}", b"x") for n in range(4) for kind in ("jpg", "txt")],
        [f"IMG_2023.05.{n:02}" for n in range(4)],
        {},
        "",
    ),
    "a key that begins like another": (
        [*PAIR, ("000.1.jpg", b"x"), ("000.1.txt", b"x")],
        ["000", "000.1"],
        {},
        "",
    ),
    "compound extensions": (
        [
            ("000.depth.png", b"x"), ("000.edges.png", b"x"), *PAIR, ("000.en.txt", b"x"), ("000.a.b.json", b"{}"),
            ("000.text.safetensors", b"x"), ("f/1.seg.png", b"x"), ("f/1.png", b"x"), ("f/1.txt", b"x"),
        ],
        ["000", "f/1"],
        {},
        "",
    ),
    "dots in folders": ([("v1.0/000.jpg", b"x"), ("v1.0/000.txt", b"x")], ["v1.0/000"], {}, ""),
    "what belongs to none is counted": (
        [*PAIR, ("a.mask.png", b"x"), ("b.jpg", b"x"), ("c.d.e.txt", b"x")],
        ["000"],
        {"missing_caption": 2, "missing_picture": 1},
        "",
    ),
    "unrelated members": (
        [*PAIR, ("README.md", b"x"), (".hidden.jpg", b"x"), ("._000.jpg", b"x"), ("stats.json", b"{}"), ("bare", b"x")],
        ["000"],
        {},
        "",
    ),
    "links and devices": (
        [
            *PAIR, ("1.jpg", b"000.jpg", tarfile.LNKTYPE), ("1.txt", b"x"), ("2.jpg", b"../x", tarfile.SYMTYPE),
            ("2.txt", b"x"), ("3.jpg", b"x"), ("3.txt", b"", tarfile.CHRTYPE), ("4.jpg", b"", tarfile.FIFOTYPE),
            ("4.txt", b"x"),
        ],
        ["000"],
        {"missing_picture": 3, "missing_caption": 1},
        "1.jpg is a hard link to 000.jpg, not a file",
    ),
    "pictures of other kinds": (
        [*PAIR, ("000.psd", b"x"), ("1.heic", b"x"), ("1.txt", b"x")],
        ["000"],
        {"missing_picture": 1},
        "1.heic is an image, but .heic is not read",
    ),
    "twins": (
        [*PAIR, ("1.jpg", b"x"), ("1.txt", b"x"), ("1.txt", b"z"), ("2.png", b"x"), ("2.jpg", b"x"), ("2.txt", b"x")],
        ["000"],
        {"duplicate_member": 2},
        "there twice",
    ),
    "captions that are none": (
        [*PAIR, ("1.jpg", b"x"), ("1.txt", b"\xff\xfe\xfd"), ("2.jpg", b"x"), ("2.txt", b"a" * 10_000_000)],
        ["000"],
        {"undecodable_caption": 2},
        "1.txt is not text in UTF-8",
    ),
    "a huge json": ([*PAIR, ("000.json", b" " * 5_000_000)], ["000"], {}, ""),
    "names that are no text": (
        [("caf\udce9.jpg", b"x"), ("caf\udce9.txt", b"x"), ("x\x1b[2J.jpg", b"x"), ("x\x1b[2J.txt", b"x")],
        ["caf\\xe9", "x\\x1b[2J"],
        {},
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", [on_disk, streamed])
@pytest.mark.parametrize("name", CASES)
def test_nothing_vanishes_uncounted(tmp_path: Path, name: str, reader) -> None:
    entries, keys, losses, words = CASES[name]
    found, counted, reasons = reader(make(tmp_path / "a.tar", entries))
    assert found == keys and counted == losses and words in reasons


def test_the_limit_counts_them(tmp_path: Path) -> None:
    path = make(tmp_path / "a.tar", [*PAIR, ("1.jpg", b"000.jpg", tarfile.LNKTYPE), ("1.txt", b"x")])
    with pytest.raises(
        UserError, match=r"1 samples without image \(first: 1: 1\.jpg is a hard link to 000\.jpg"
    ):
        find_shards("data.train", [str(path)], 0.0)


def test_a_picture_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.shards.members.LIMITS", (4, 64 << 10, 1 << 20, 16 << 20))
    path = make(tmp_path / "a.tar", [*PAIR, ("1.jpg", b"xxxxx"), ("1.txt", b"x")])
    for reader in (on_disk, streamed):
        keys, losses, reasons = reader(path)
        assert keys == ["000"] and losses == {"undecodable_picture": 1} and "5 bytes, more than 4" in reasons


def test_streams_hold_few_samples_whatever_the_names(tmp_path: Path) -> None:
    """A chain of keys, each the beginning of the next, of which any could still get its caption."""
    chain = [("a" + ".b" * n + ".jpg", b"x") for n in range(200)]
    keys, losses, _ = streamed(make(tmp_path / "a.tar", [*chain, *PAIR]))
    assert keys == ["000"] and losses == {"missing_caption": 200}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "null", "[]", "3", '"x"', "\xff", "[" * 100_000, '{"height": ' + "9" * 10_000 + ', "width": 5}',
        *(
            f'{{"height": {height}, "width": {width}}}'
            for height, width in [
                ("Infinity", 96), ("-Infinity", 96), ("NaN", 96), ("1e30", 96), ("-5", 96), ("0", 96), ("true", "true"),
                ("[10]", "[12]"), ('"100"', '"120"'), ("100.5", 120), (10**400, 120), ("{}", "null"), (100, 12_000),
                (1 << 40, 1 << 40),
            ]
        ),
        '{"height": 100, "width": 120, "height": -100}', '{"height": 100}', '{"width": 120}',
    ],
)  # fmt: skip
def test_a_foreign_json_is_ignored(content: str) -> None:
    assert original_size(content.encode("latin-1"), (10, 12)) == (10, 12)


def test_a_json_that_fits_is_read() -> None:
    assert original_size(json.dumps({"height": 100, "width": 120, "x": [1]}).encode(), (10, 12)) == (100, 120)
    assert original_size(b'{"height": -5, "height": 100, "width": 120}', (10, 12)) == (100, 120)
    assert original_size(None, (10, 12)) == (10, 12)


def test_a_picture_with_a_hostile_json_trains_as_any_other(tmp_path: Path) -> None:
    from batch_cases import module, take

    entries: list[Entry] = []
    for number, meta in enumerate(
        [b'{"height": Infinity, "width": 96}', b"[" * 5000, b'{"height": -5, "width": -5}']
    ):
        entries += [(f"{number}.png", png(number)), (f"{number}.txt", b"x"), (f"{number}.json", meta)]
    for split in ("train", "validation"):
        make(tmp_path / f"{split}-0.tar", entries)
    batch = take(module(tmp_path, batch_size=3, max_bad_fraction=0.0, crop="center", crop_base=100), 1)[0]
    assert batch["size"].tolist() == [[10, 12]] * 3 and batch["crop"].tolist() == [[100, 120, 0, 10]] * 3
