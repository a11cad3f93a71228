"""Embedding files that are damaged, foreign or hostile: refused on opening, or counted when a sample is read."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_cases import take
from data_shards import make_set
from embedding_cases import LENGTH, POOLED, WIDTH, HashEncoder, data_of, make_store
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.shards.bad_samples import BadSample
from datamodules.shards.embedding_file import SideFile, encode_entry, read_entry
from datamodules.shards.index import build_index, load_index
from datamodules.shards.open_files import OpenFiles
from switti.errors import UserError

Tensors = dict[str, Tensor]
Metadata = dict[str, str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_set(tmp_path, [4, 3])
    make_set(tmp_path, [2], "validation")
    return tmp_path


def rewrite(path: Path, change: Callable[[Tensors, Metadata], Any], store: Path, listed: bool) -> None:
    """Change a side file's contents; listed: in a store of the older format, whose manifest lists no digests."""
    tensors = load_file(path)
    keys = SideFile(path).keys
    metadata = {"fingerprint": "f" * 64, "keys": json.dumps(keys)}
    change(tensors, metadata)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    if not listed:
        manifest = json.loads((store / "manifest.json").read_text())
        manifest.pop("heads", None)
        (store / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


def offsets(*values: int) -> Callable[[Tensors, Metadata], None]:
    return lambda tensors, _: tensors.update(offsets=torch.tensor(values))


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Metadata], None]:
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


def keys(value: object) -> Callable[[Tensors, Metadata], None]:
    return lambda _, metadata: metadata.update(keys=value if isinstance(value, str) else json.dumps(value))


BROKEN: dict[str, Callable[[Tensors, Metadata], Any]] = {
    "descending offsets": replaced("offsets", lambda x: x.flip(0)),
    "negative offsets": replaced("offsets", lambda x: x - 1),
    "offsets past the end": replaced("offsets", lambda x: torch.cat([x[:-1], x[-1:] + 5])),
    "offsets that begin late": replaced("offsets", lambda x: torch.cat([x[:1] + 1, x[1:]])),
    "offsets that end early": replaced("offsets", lambda x: torch.cat([x[:-1], x[-1:] - 1])),
    "offsets that wrap": replaced("offsets", lambda x: torch.cat([x[:1], x[1:-1] * 0 + 2**62, x[-1:]])),
    "an empty caption": replaced("offsets", lambda x: torch.cat([x[:1], x[:1], x[2:]])),
    "two-dimensional offsets": replaced("offsets", lambda x: x[:, None]),
    "float offsets": replaced("offsets", lambda x: x.float()),
    "int32 offsets": replaced("offsets", lambda x: x.int()),
    "too few offsets": replaced("offsets", lambda x: x[:-1]),
    "no rows": lambda tensors, metadata: (
        tensors.update({name: value[:0] for name, value in tensors.items()}, offsets=torch.zeros(1).long()),
        metadata.update(keys="[]"),
    ),
    "int64 tokens": replaced("tokens", lambda x: x.long()),
    "float32 tokens": replaced("tokens", lambda x: x.float()),
    "wide tokens": replaced("tokens", lambda x: torch.cat([x, x], 1)),
    "narrow tokens": replaced("tokens", lambda x: x[:, 1:]),
    "tokens without channels": replaced("tokens", lambda x: x[:, :0]),
    "flat tokens": replaced("tokens", lambda x: x.flatten()),
    "missing tokens": lambda tensors, _: tensors.pop("tokens"),
    "captions longer than the encoder's": lambda tensors, _: tensors.update(
        tokens=torch.zeros(50, WIDTH).half(), offsets=torch.tensor([0, 47, 48, 49, 50])
    ),
    "one pooled row": replaced("pooled", lambda x: x[:1]),
    "wide pooled rows": replaced("pooled", lambda x: torch.cat([x, x], 1)),
    "float16 pooled rows": replaced("pooled", lambda x: x.half()),
    "missing pooled rows": lambda tensors, _: tensors.pop("pooled"),
    "short digests": replaced("caption_sha256", lambda x: x[:, :16]),
    "digests of signed bytes": replaced("caption_sha256", lambda x: x.view(torch.int8)),
    "checks of another length": replaced("crc32", lambda x: x[1:]),
    "deep keys": keys("[" * 100_000),
    "keys that are no list": keys({"a": 1}),
    "keys that are numbers": keys([1, 2, 3, 4]),
    "keys that come twice": keys(["s0n0", "s0n0", "s0n2", "s0n3"]),
    "too few keys": keys(["s0n0"]),
    "no keys": lambda _, metadata: metadata.pop("keys"),
    "no fingerprint": lambda _, metadata: metadata.pop("fingerprint"),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_on_opening(folder: Path, name: str, listed: bool) -> None:
    store, _ = make_store(folder)
    path = store / "train-000000.safetensors"
    rewrite(path, BROKEN[name], store, listed)
    with pytest.raises(UserError) as caught:
        data_of(folder).setup("fit")
    message = str(caught.value)
    assert str(path) in message and "run experiments.embed again" in message and "\n" not in message
    assert make_store(folder)[1] == 4  # which helps
    data_of(folder).setup("fit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["tokens", "pooled"])
def test_a_value_that_is_not_finite_is_damage_of_its_sample(folder: Path, part: str, value: float) -> None:
    store, _ = make_store(folder)
    path = store / "train-000000.safetensors"

    def change(tensors: Tensors, _: Metadata) -> None:
        row = int(tensors["offsets"][2]) if part == "tokens" else 2
        tensors[part][row, 0] = value
        del tensors["crc32"]  # written by somebody who had none

    rewrite(path, change, store, listed=False)
    with pytest.raises(
        UserError, match=r"000000\.safetensors.*row 2 is not finite; run experiments\.embed again"
    ):
        take(data_of(folder, max_bad_fraction=0.0), 4)
    batches = take(data_of(folder, max_bad_fraction=1.0), 4)
    assert all(batch["text"].isfinite().all() and batch["pooled"].isfinite().all() for batch in batches)
    assert "train-000000/s0n2" not in [key for batch in batches for key in batch["key"]]


def test_a_value_that_has_changed_is_damage_of_its_sample(folder: Path) -> None:
    store, _ = make_store(folder)
    path = store / "train-000000.safetensors"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[whole.index(load_file(path)["pooled"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    data = data_of(folder)
    data.setup("fit")
    damage = data.training_set.samples.read(0, 0, 0)
    assert isinstance(damage, BadSample) and damage.kind == "missing_embedding"
    assert "row 0 is corrupt; run experiments.embed again" in damage.reason
    assert make_store(folder)[1] == 4 and path.read_bytes() == whole


def test_another_file_under_the_name_is_refused(folder: Path) -> None:
    """Complete and of the right captions and encoder, but not what the manifest lists."""
    store, _ = make_store(folder)
    path = store / "train-000000.safetensors"
    rewrite(path, replaced("offsets", lambda x: torch.cat([x[:1], x[1:2] + 1, x[2:]])), store, listed=True)
    with pytest.raises(
        UserError, match=r"is not the file that .*manifest\.json lists; run experiments\.embed again"
    ):
        data_of(folder).setup("fit")


@pytest.mark.parametrize("value", [float("nan"), None])
def test_the_null_captions_file_is_checked_as_the_others(folder: Path, value: float | None) -> None:
    store, _ = make_store(folder)

    def change(tensors: Tensors, _: Metadata) -> None:
        del tensors["crc32"]
        tensors["pooled"] = torch.full((1, POOLED), value) if value else tensors["pooled"][:0]

    rewrite(store / "null.safetensors", change, store, listed=False)
    with pytest.raises(UserError, match=r"null\.safetensors.*experiments\.embed again"):
        data_of(folder).setup("fit")
    make_store(folder)
    data_of(folder).setup("fit")


@pytest.mark.parametrize("listed", [True, False])
def test_another_captions_file_is_not_taken_for_the_null_captions(folder: Path, listed: bool) -> None:
    store, _ = make_store(folder)
    rewrite(store / "train-000000.safetensors", lambda *_: None, store, listed)
    (store / "null.safetensors").write_bytes((store / "train-000000.safetensors").read_bytes())
    make_set(folder, [4])
    words = "is not the file that" if listed else "is not the embedding of the empty caption"
    with pytest.raises(UserError, match=words):
        data_of(folder).setup("fit")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 700, -1, -300])
def test_a_file_that_is_cut_off_is_refused(folder: Path, keep: int) -> None:
    store, _ = make_store(folder)
    path = store / "train-000000.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"000000\.safetensors.*run experiments\.embed again"):
        data_of(folder).setup("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_shrinks_while_it_is_read_is_damage(folder: Path, workers: int) -> None:
    """Under a memory map it would end the process without a word."""
    store, _ = make_store(folder)
    data = data_of(folder, max_bad_fraction=1.0, workers=workers)
    data.setup("fit")
    os.truncate(store / "train-000000.safetensors", 8)
    keys = [key for batch in take(data, 4) for key in batch["key"]]
    assert keys and all(key.startswith("train-000001") for key in keys)
    os.truncate(store / "train-000001.safetensors", 8)
    with pytest.raises(
        UserError, match=r"no sample of a batch can be read.*safetensors .*run experiments\.embed again"
    ):
        take(data, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 1 << 40), ("width", "6"), ("width", True), ("max_length", 0), ("max_length", 1e9),
        ("pooled_width", -1), ("fingerprint", None), ("fingerprint", [1]), ("name", 3), ("heads", 3), ("heads", None),
        ("width", WIDTH + 1), ("width", None),
    ],
)  # fmt: skip
def test_a_manifest_of_odd_values_is_refused(folder: Path, field: str, value: object) -> None:
    store, _ = make_store(folder)
    content = json.loads((store / "manifest.json").read_text()) | {field: value}
    if value is None:
        del content[field]
    (store / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"(manifest|safetensors).*experiments\.embed again"):
        data_of(folder).setup("fit")


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, "\0", '{"format": 2'])
def test_a_manifest_that_is_none_is_refused(folder: Path, content: str) -> None:
    store, _ = make_store(folder)
    (store / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        data_of(folder).setup("fit")
    make_store(folder)
    data_of(folder).setup("fit")


def test_a_store_of_the_older_format_reads_the_same(folder: Path) -> None:
    store, _ = make_store(folder)
    before = [batch["text"] for batch in take(data_of(folder), 3)]
    for path in store.glob("*.safetensors"):
        rewrite(path, lambda tensors, _: tensors.pop("crc32"), store, listed=False)
    assert all(torch.equal(a, b["text"]) for a, b in zip(before, take(data_of(folder), 3), strict=True))


def test_a_row_is_read_as_it_was_written(folder: Path) -> None:
    store, _ = make_store(folder)
    side, files = SideFile(store / "train-000001.safetensors", HashEncoder().identity), OpenFiles(1)
    for row, key in enumerate(side.keys):
        tokens, pooled = side.read(row, files)
        expected = HashEncoder.one(f"caption {key}")
        assert tokens.dtype == torch.float16 and torch.equal(tokens.float(), expected[0])
        assert torch.equal(pooled, expected[1])


def test_an_entry_of_a_shard_is_checked_as_a_side_file(folder: Path) -> None:
    text, identity = (torch.ones(3, WIDTH).half(), torch.ones(POOLED)), HashEncoder().identity
    entry = encode_entry(text, b"cat", "f" * 64)
    tokens, pooled = read_entry(entry, b"cat", identity)
    assert torch.equal(tokens, text[0]) and torch.equal(pooled, text[1])
    for bad in (
        entry[:-1], entry + b"x", b"", entry[:20], encode_entry((text[0] * float("nan"), text[1]), b"cat", "f" * 64),
        encode_entry((text[0][:, 1:], text[1]), b"cat", "f" * 64),
        encode_entry((text[0], text[1][1:]), b"cat", "f" * 64),
        encode_entry((torch.ones(LENGTH + 1, WIDTH).half(), text[1]), b"cat", "f" * 64),
        encode_entry((text[0].float(), text[1]), b"cat", "f" * 64), encode_entry(text, b"dog", "f" * 64),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the embedding"):
            read_entry(bad, b"cat", identity)
    with pytest.raises(ValueError, match="another text encoder"):
        read_entry(encode_entry(text, b"cat", "e" * 64), b"cat", identity)


# ---- the index beside a shard -------------------------------------------------------------------------------------


def stored_index(path: Path, change: Callable[[Tensors, Metadata], Any]) -> None:
    """Rewrite a shard's stored index with a digest that fits."""
    side = path.with_name(path.name + ".index.safetensors")
    tensors, index = load_file(side), load_index(path)
    metadata = {"keys": json.dumps(index.keys), "losses": "[]"}
    change(tensors, metadata)
    digest = hashlib.sha256()
    for name in ("stamp", "offsets", "sizes", "digests"):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    for name in ("keys", "losses"):
        digest.update(f"\0{metadata[name]}".encode())
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, side, metadata | {"sha256": digest.hexdigest()}
    )


UNFIT: dict[str, Callable[[Tensors, Metadata], Any]] = {
    "offsets before the shard": replaced("offsets", lambda x: x - 1_000_000),
    "offsets behind it": replaced("offsets", lambda x: x + 2**40),
    "offsets that wrap": replaced("offsets", lambda x: x * 0 + 2**63 - 1),
    "sizes that wrap": replaced("sizes", lambda x: x * 0 + 2**63 - 1),
    "no sizes": replaced("sizes", lambda x: x * 0 - 1),
    "negative sizes": replaced("sizes", lambda x: x * 0 - 2**63),
    "sizes past the end": replaced("sizes", lambda x: x + 10**6),
    "fewer sizes": replaced("sizes", lambda x: x[:1]),
    "int32 offsets": replaced("offsets", lambda x: x.int()),
    "float offsets": replaced("offsets", lambda x: x.float()),
    "short digests": replaced("digests", lambda x: x[:, :5]),
    "another shard": replaced("stamp", lambda x: x + 1),
    "no keys": keys([]),
    "keys that come twice": keys(["a", "a"]),
    "deep keys": keys("[[" * 5000),
    "keys that are numbers": keys([1, 2]),
    "an empty key": keys(["a", ""]),
    "half a character": keys('["a", "\\ud800"]'),
    "control characters": keys(["a", "b\x1b[2J"]),
    "losses of no kind": lambda _, metadata: metadata.update(losses='[["x", "y", 1]]'),
    "negative losses": lambda _, metadata: metadata.update(losses='[["missing_picture", "y", -1]]'),
    "losses that are no list": lambda _, metadata: metadata.update(losses="3"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_stored_index_that_does_not_fit_is_made_again(folder: Path, name: str) -> None:
    path = make_set(folder / "two", [2]).replace("*", "000000")
    load_index(Path(path))
    stored_index(Path(path), UNFIT[name])
    found, built = load_index(Path(path)), build_index(Path(path))
    assert found.keys == built.keys and found.losses == built.losses
    assert np.array_equal(found.offsets_N3, built.offsets_N3) and np.array_equal(
        found.sizes_N3, built.sizes_N3
    )


def test_a_stored_index_is_read_for_what_it_says(folder: Path) -> None:
    """The test above can fail: an index that is changed and fits is believed."""
    path = Path(make_set(folder / "two", [2]).replace("*", "000000"))
    load_index(path)
    stored_index(path, keys(["other", "names"]))
    assert load_index(path).keys == ["other", "names"]
