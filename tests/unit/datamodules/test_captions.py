"""Samples with several captions: one is drawn in each epoch, with its own embedding; the same draws on any workers."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from data_shards import make_shard, png
from embedding_cases import HashEncoder, data_of

from datamodules.embed_shards import embed_shards
from datamodules.shards.index import load_index
from datamodules.shards.samples import MAX_CAPTIONS, captions_in
from switti.errors import UserError
from switti.files import read_json_object

CAPTIONS = {
    "a": ["a", "a one", "a two"],
    "b": ["b"],
    "c": ["c", "c one"],
    "d": ["d", "d one", "d two", "d three"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-000000.tar", CAPTIONS)
    make_shard(tmp_path / "validation-000000.tar", ["v"])
    return tmp_path


def write(path: Path, captions: dict[str, list[str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (key, texts) in enumerate(captions.items()):
            meta = json.dumps({"captions": texts}).encode()
            for suffix, data in (("png", png(number)), ("txt", texts[0].encode()), ("json", meta)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def embedded(folder: Path, all_captions: bool = True) -> tuple[Path, tuple[int, int]]:
    encoder = HashEncoder()
    indices = [load_index(path) for path in sorted(folder.glob("*.tar"))]
    store = folder / "embeddings" / encoder.identity.folder
    return store, embed_shards(indices, encoder, encoder.identity, store, 2, all_captions)  # type: ignore[arg-type]


def drawn(folder: Path, batches: int, **settings) -> list[dict]:
    data = data_of(folder, "f" * 64, captions="drawn", caption_dropout=0.2, **settings)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_caption_is_drawn_and_carries_its_own_embedding(folder: Path, workers: int) -> None:
    assert embedded(folder)[1] == (11, 11)
    seen: dict[str, set[str]] = {key: set() for key in CAPTIONS}
    for batch in drawn(folder, 30, workers=workers):
        for i, name in enumerate(batch["key"]):
            caption = batch["caption"][i]
            states, pooled = HashEncoder.one(caption)
            assert torch.equal(batch["text"][i][batch["text_mask"][i]], states)
            assert torch.equal(batch["pooled"][i], pooled)
            if not batch["dropped"][i]:
                seen[name.split("/")[1]].add(caption)
    assert {key: sorted(found) for key, found in seen.items()} == {k: sorted(v) for k, v in CAPTIONS.items()}


def test_draws_depend_on_the_position_alone(folder: Path) -> None:
    embedded(folder)
    one, other = (drawn(folder, 6, workers=workers) for workers in (0, 2))
    assert [batch["caption"] for batch in one] == [batch["caption"] for batch in other]


def test_the_first_caption_is_the_default_and_that_of_validation(folder: Path) -> None:
    embedded(folder)
    data = data_of(folder, "f" * 64, caption_dropout=0.0)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    assert {caption for _ in range(5) for caption in next(loader)["caption"]} == set("abcd")
    data = data_of(folder, "f" * 64, captions="drawn", validation=f"{folder}/train-*.tar")
    data.setup("fit")
    assert {caption for batch in data.val_dataloader() for caption in batch["caption"]} == set("abcd")


def test_a_store_of_first_captions_says_what_to_do_and_is_completed(folder: Path) -> None:
    store, counts = embedded(folder, all_captions=False)
    assert counts == (5, 5) and not list(store.glob("*.variants.safetensors"))
    with pytest.raises(
        UserError, match=r"data\.captions=drawn: .*run experiments\.embed again --all-captions"
    ):
        drawn(folder, 1)
    assert embedded(folder)[1] == (6, 11)
    assert embedded(folder)[1] == (0, 11)
    manifest = read_json_object(store / "manifest.json")
    assert manifest["variants"] == {"train-000000": 6, "validation-000000": 0}
    # The command without the option does nothing, and takes nothing back.
    assert embedded(folder, all_captions=False)[1] == (0, 5)
    assert read_json_object(store / "manifest.json") == manifest
    drawn(folder, 1)


def test_captions_that_have_changed_since_count_as_missing(folder: Path) -> None:
    """The stored caption is the same, so that only its sample's json can tell."""
    embedded(folder)
    write(folder / "train-000000.tar", CAPTIONS | {"a": ["a", "x", "y"]})
    data = data_of(folder, "f" * 64, captions="drawn", caption_dropout=0.0, max_bad_fraction=1.0)
    data.setup("fit")
    data.watched = True
    loader = iter(data.train_dataloader())
    captions = {caption for _ in range(20) for caption in next(loader)["caption"]}
    assert {"x", "y"} & captions == set() and "a" in captions
    assert {damage.kind for damage in data.bad_samples.claim()[1]} == {"missing_embedding"}


def test_a_side_file_of_other_samples_is_refused(folder: Path) -> None:
    embedded(folder)
    write(folder / "train-000000.tar", {"z" + key: texts for key, texts in CAPTIONS.items()})
    with pytest.raises(UserError, match=r"run experiments\.embed again"):
        drawn(folder, 1)


@pytest.mark.parametrize(
    "meta",
    [None, b"", b"[]", b'{"captions": 3}', b'{"captions": {"a": 1}}', b'{"captions": [null, 2, "", " ", ["x"], "x"]}',
     b'{"captions": ["\\u0000", "\\ud800", "x"]}'],
)  # fmt: skip
def test_foreign_json_gives_no_captions_that_are_none(meta: bytes | None) -> None:
    assert captions_in(meta, "x") == ["x"]


def test_captions_are_bounded_in_number_and_length() -> None:
    many = json.dumps({"captions": [f"c{n}" for n in range(1000)] + ["y" * 100_000]}).encode()
    assert captions_in(many, "x") == ["x", *(f"c{n}" for n in range(MAX_CAPTIONS - 1))]
