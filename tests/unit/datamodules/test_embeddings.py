"""Embeddings as side files: joined by key, refused when they do not belong."""

import hashlib
import json

import numpy as np
import pytest
import torch
from data_shards import make_set, make_shard
from embedding_cases import LENGTH, WIDTH, HashEncoder, data_of, make_store
from safetensors import safe_open
from safetensors.torch import load_file

from datamodules.shards.embedding_file import concatenate, pack
from datamodules.shards.embeddings import EmbeddingStore
from datamodules.shards.index import load_index
from experiments.embed import main, text_config
from switti.errors import UserError


@pytest.fixture
def folder(tmp_path):
    make_set(tmp_path, [4, 3])
    make_set(tmp_path, [2], "validation")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_each_captions_own_embedding(folder, workers):
    make_store(folder)
    data = data_of(folder, "f" * 64, workers=workers)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    drops = 0
    for _ in range(5):
        batch = next(loader)
        assert batch["text"].shape == (4, LENGTH, WIDTH) and batch["text_mask"].shape == (4, LENGTH)
        for i, key in enumerate(batch["key"]):
            drops += bool(batch["dropped"][i])
            caption = "" if batch["dropped"][i] else f"caption {key.split('/')[1]}"
            states, pooled = HashEncoder.one(caption)
            assert torch.equal(batch["text"][i][batch["text_mask"][i]], states)
            assert not batch["text"][i][~batch["text_mask"][i]].any()
            assert batch["text_mask"][i].tolist() == [t < len(states) for t in range(LENGTH)]
            assert torch.equal(batch["pooled"][i], pooled)
    assert 0 < drops < 20
    assert all("text" in batch for batch in data.val_dataloader())


def test_pack_and_concatenate_in_closed_form():
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    one = pack(tokens, mask, torch.zeros(2, 1))
    assert one.tokens_RC.tolist() == [[0, 1], [6, 7], [8, 9]] and one.offsets.tolist() == [0, 1, 3]
    assert concatenate([one, one]).offsets.tolist() == [0, 1, 3, 4, 6]
    with pytest.raises(UserError, match="float16"):
        pack(torch.full((1, 1, 1), 1e6), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1))


def test_side_file_holds_what_it_says(folder):
    store, written = make_store(folder)
    assert written == 9
    tensors = load_file(store / "train-000000.safetensors")
    assert tensors["tokens"].dtype == torch.float16
    captions = [f"caption s0n{i}\n" for i in range(4)]  # the digest is of the bytes in the shard
    assert [bytes(row.tolist()) for row in tensors["caption_sha256"]] == [
        hashlib.sha256(c.encode()).digest() for c in captions
    ]
    with safe_open(store / "train-000000.safetensors", "pt") as file:
        assert json.loads(file.metadata()["keys"]) == [f"s0n{i}" for i in range(4)]
    assert (store / "train-000000.safetensors").stat().st_mode & 0o444 == (
        folder / "train-000000.tar"
    ).stat().st_mode & 0o444
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["fingerprint"] == "f" * 64 and manifest["samples"]["train-000000"] == 4


def test_interrupted_embedding_goes_on_and_finished_does_nothing(folder):
    store, _ = make_store(folder)
    (store / "manifest.json").unlink()
    (store / "train-000001.safetensors").write_bytes(b"torn")
    encoder = HashEncoder()
    assert make_store(folder, encoder)[1] == 3
    assert encoder.seen == ["caption s1n0", "caption s1n1", "caption s1n2"]
    again = HashEncoder()
    assert make_store(folder, again)[1] == 0 and again.seen == []


def test_changed_captions_are_refused_and_embedded_again(folder):
    make_store(folder)
    make_shard(folder / "train-000001.tar", ["s1n0", "other", "s1n2"])
    with pytest.raises(UserError, match=r"lacks 1 samples.*other"):
        data_of(folder).setup("fit")
    make_store(folder)
    data_of(folder).setup("fit")
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"caption s1n2", b"kaption s1n2"))
    with pytest.raises(UserError, match=r"other captions.*1 differ, first: s1n2"):
        data_of(folder).setup("fit")


def test_rows_are_joined_by_key_not_by_place(folder):
    make_store(folder)
    reordered = make_shard(folder / "other" / "train-000000.tar", ["s0n3", "s0n0"])
    shard = load_index(reordered)
    store = EmbeddingStore([str(folder / "embeddings")], [shard], None)
    for row, key in enumerate(("s0n3", "s0n0")):
        tokens, pooled = store.read(0, row)
        assert torch.equal(tokens, HashEncoder.one(f"caption {key}")[0])
        assert torch.equal(pooled, HashEncoder.one(f"caption {key}")[1])


def test_the_runs_encoder_picks_its_store_or_is_refused(folder):
    make_store(folder)
    make_store(folder, HashEncoder("a" * 64))
    data_of(folder, "a" * 64).setup("fit")
    with pytest.raises(UserError, match="several stores"):
        data_of(folder).setup("fit")
    with pytest.raises(
        UserError, match=r"another text encoder \(hash-aaaaaaaaaaaa, hash-ffffffffffff\).*bbbbbbbbbbbb"
    ):
        data_of(folder, "b" * 64).setup("fit")
    with pytest.raises(UserError, match="another text encoder"):
        data_of(folder, "a" * 64, embeddings=f"{folder}/embeddings/hash-ffffffffffff").setup("fit")


def test_missing_and_torn_stores(folder):
    with pytest.raises(UserError, match=r"no finished embeddings.*experiments\.embed"):
        data_of(folder).setup("fit")
    store, _ = make_store(folder)
    (store / "train-000001.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="not a complete embedding file"):
        data_of(folder).setup("fit")
    (store / "train-000001.safetensors").unlink()
    with pytest.raises(UserError, match="no embeddings of shard"):
        data_of(folder).setup("fit")


def test_two_data_folders_with_equal_stems(tmp_path):
    stores = []
    for name, key in (("a", "x"), ("b", "y")):
        make_shard(tmp_path / name / "train-0.tar", [key])
        stores.append(str(make_store(tmp_path / name)[0]))
    make_shard(tmp_path / "validation-0.tar", ["z"])
    make_store(tmp_path, out=tmp_path / "embeddings")
    stores.append(str(tmp_path / "embeddings"))
    shards = [load_index(tmp_path / name / "train-0.tar") for name in ("a", "b")]
    store = EmbeddingStore(stores, shards, "f" * 64)
    assert torch.equal(store.read(1, 0)[1], HashEncoder.one("caption y")[1])
    assert torch.equal(store.read(0, 0)[1], HashEncoder.one("caption x")[1])


def test_command_settings(tmp_path):
    assert text_config("minilm", ["text.max_length=12"]).max_length == 12
    clip = text_config("clip_pair", ["clip_l=/somewhere"])
    assert (clip.width, clip.pooled_width, clip.max_length, clip.clip_l) == (2048, 1280, 77, "/somewhere")
    for bad in ("max_lenth=3", "max_length=many", "max_length", "max_length=1"):
        with pytest.raises(UserError, match="max_len"):
            text_config("minilm", [bad])
    for arguments in ([str(tmp_path)], [str(tmp_path / "nowhere")], [str(tmp_path), "--batch", "0"]):
        with pytest.raises(UserError):
            main(arguments)


def test_command_with_an_encoder(folder, monkeypatch, capsys):
    monkeypatch.setattr("switti.text.build.build_text_encoder", lambda config, device: HashEncoder())
    assert main([str(folder), "--batch", "3"]) == 0
    assert "9 of 9 captions" in capsys.readouterr().out
    assert main([str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    rows = np.concatenate(
        [load_file(p)["offsets"].numpy() for p in folder.glob("embeddings/*/train-*.safetensors")]
    )
    assert len(rows) == 4 + 1 + 3 + 1
