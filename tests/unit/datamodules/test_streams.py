"""Streams for generators: embeddings in the shards or encoded on the way, through pipes and HTTP."""

import functools
import http.server
import io
import random
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from batch_cases import take
from data_shards import make_set, make_shard
from embedding_cases import LENGTH, WIDTH, HashEncoder, make_store

from configs.loading import load
from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule
from datamodules.shards.embedded_shards import write_embedded_shards
from datamodules.shards.index import load_index
from datamodules.shards.stream_samples import StoredSample, stored_samples
from datamodules.shards.streams import SHUFFLE_BUFFER, shuffled
from datamodules.shards.tar import StreamSource
from switti.errors import UserError


class MovingEncoder(HashEncoder):
    """Its embeddings are bound to the captions, and it says where it was sent."""

    def to(self, device: torch.device) -> "MovingEncoder":
        return self


def module(folder: Path, train: str, encoder: HashEncoder | None = None, **settings) -> ShardDataModule:
    defaults = {"batch_size": 4, "workers": 0, "caption_dropout": 0.4, "max_bad_fraction": 1.0}
    config = DataConfig(
        **({"train": train, "validation": f"{folder}/validation-*.tar"} | defaults | settings)
    )
    config.validate("data")
    return ShardDataModule(config, seed=1, resolution=8, encoder=encoder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards, and copies that carry their embeddings in streamed/."""
    make_set(tmp_path, [4, 3])
    make_set(tmp_path, [2], "validation")
    store, _ = make_store(tmp_path)
    indices = [load_index(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert write_embedded_shards(indices, store, tmp_path / "streamed") == 3
    assert write_embedded_shards(indices, store, tmp_path / "streamed") == 0
    return tmp_path


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def check(batches: list[dict]) -> tuple[int, int]:
    """Each caption's own embedding, the empty one's where it was dropped; (samples, dropped)."""
    drops = 0
    for batch in batches:
        assert batch["text"].shape == (len(batch["key"]), LENGTH, WIDTH)
        for i, caption in enumerate(batch["caption"]):
            drops += bool(batch["dropped"][i])
            assert caption == ("" if batch["dropped"][i] else f"caption {batch['key'][i].split('/')[1]}")
            states, pooled = HashEncoder.one(caption)
            assert torch.equal(batch["text"][i][batch["text_mask"][i]], states)
            assert torch.equal(batch["pooled"][i], pooled)
    return sum(len(batch["key"]) for batch in batches), drops


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "place", ["pipe:cat {folder}/streamed/", "{address}/streamed/", "pipe:cat {folder}/"]
)
def test_streams_bring_each_captions_embedding(folder: Path, address: str, place: str, workers: int) -> None:
    train = place.format(folder=folder, address=address) + "train-{000000..000001}.tar"
    encoder = MovingEncoder()
    data = module(folder, train, encoder, workers=workers)
    samples, drops = check(take(data, 8))
    assert samples == 32 and 0 < drops < 32
    # What the shards carry is not encoded again; the empty caption is, once.
    assert encoder.seen == [""] if "streamed" in place else len(encoder.seen) > 1
    check(list(data.val_dataloader()))


def test_shards_on_disk_without_embeddings_are_encoded_on_the_way(folder: Path) -> None:
    stored = module(folder, f"{folder}/train-*.tar", MovingEncoder(), embeddings=f"{folder}/embeddings")
    encoded = module(folder, f"{folder}/train-*.tar", MovingEncoder())
    for ours, theirs in zip(take(encoded, 4), take(stored, 4), strict=True):
        assert ours["key"] == theirs["key"]
        for name in ("image", "text", "text_mask", "pooled"):
            assert torch.equal(ours[name], theirs[name])


def test_a_tokenizers_stream_has_no_text(folder: Path) -> None:
    batch = take(module(folder, f"pipe:cat {folder}/streamed/train-000000.tar"), 1)[0]
    assert "text" not in batch and batch["image"].shape == (4, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_embeddings_of_another_encoder_end_the_run(folder: Path, workers: int) -> None:
    data = module(
        folder, f"pipe:cat {folder}/streamed/train-000000.tar", MovingEncoder("a" * 64), workers=workers
    )
    with pytest.raises(
        UserError, match=r"carries an embedding of another text encoder \(ffffff.*than the run's \(aaa"
    ):
        take(data, 1)


def changed(source: Path, target: Path, change) -> str:
    """A stream of a tar's entries after `change`(name, data), which gives None for what is left out."""
    with tarfile.open(source) as before, tarfile.open(target, "w") as after:
        for member in before:
            data = change(member.name, before.extractfile(member).read())
            if data is not None:
                member.size = len(data)
                after.addfile(member, io.BytesIO(data))
    return f"pipe:cat {target}"


def test_samples_without_caption_or_embedding_and_damaged_ones(folder: Path) -> None:
    def change(name: str, data: bytes) -> bytes | None:
        if name == "s0n0.txt" or name == "s0n1.text.safetensors":
            return None
        return data[:-5] if name == "s0n2.text.safetensors" else data

    train = changed(folder / "streamed" / "train-000000.tar", folder / "x.tar", change)
    encoder = MovingEncoder()
    data = module(folder, train, encoder)
    data.watched = True
    batches = take(data, 8)
    check(batches)
    assert {key for batch in batches for key in batch["key"]} == {"x/s0n1", "x/s0n3"}
    assert set(encoder.seen) == {"", "caption s0n1"}
    assert data.bad_samples is not None
    found = {(d.kind, d.key, d.samples) for _ in range(8) for d in data.bad_samples.claim()[1]}
    assert found == {("missing_caption", "x/s0n0", 1), ("missing_embedding", "x/s0n2", 1)}


def test_an_embedding_of_another_caption_is_damage(folder: Path) -> None:
    train = changed(
        folder / "streamed" / "train-000000.tar",
        folder / "x.tar",
        lambda name, data: b"another" if name == "s0n3.txt" else data,
    )
    batches = take(module(folder, train, MovingEncoder()), 8)
    assert "x/s0n3" not in {key for batch in batches for key in batch["key"]}


def test_shards_with_embeddings_are_the_shards_and_more(folder: Path) -> None:
    ours, theirs = (load_index(folder / place / "train-000000.tar") for place in ("streamed", "."))
    assert ours.keys == theirs.keys and (ours.digests_N32 == theirs.digests_N32).all() and ours.losses == ()
    first = (folder / "streamed" / "train-000000.tar").read_bytes()
    (folder / "streamed" / "train-000000.tar").unlink()
    store = next((folder / "embeddings").iterdir())
    assert write_embedded_shards([theirs], store, folder / "streamed") == 1
    assert (folder / "streamed" / "train-000000.tar").read_bytes() == first
    with pytest.raises(UserError, match="holds the shards themselves"):
        write_embedded_shards([theirs], store, folder)


def test_the_shuffle_holds_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.shards.streams.SHUFFLE_BYTES", 1000)
    given = most = 0

    def samples() -> Iterator[StoredSample]:
        nonlocal given
        for number in range(5000):
            given += 1
            yield StoredSample("a", str(number), {0: b"x" * 90})

    keys = []
    for taken, sample in enumerate(shuffled(samples(), random.Random(0)), 1):
        most = max(most, given - taken)
        keys.append(sample.key)
    assert (
        most <= 13
        and sorted(keys, key=int) == [str(n) for n in range(5000)]
        and keys != sorted(keys, key=int)
    )
    assert SHUFFLE_BUFFER == 1000


def test_a_stream_that_ends_within_a_member_says_so(tmp_path: Path) -> None:
    content = make_shard(tmp_path / "a.tar", ["x", "y"]).read_bytes()
    with pytest.raises(OSError, match=r"ends at byte \d+, within"):
        list(stored_samples(StreamSource(io.BytesIO(content[:600])), "a"))


def test_settings_of_a_generator_on_a_stream() -> None:
    stream, metrics = "data.train=pipe:cat a.tar", "metrics.captions=validation"
    load("generator/demo", [stream, "data.embeddings=null", metrics])
    load("generator/demo", [stream, metrics])  # embeddings of the validation
    with pytest.raises(UserError, match=r"metrics\.captions=train needs shards on disk.*metrics_every=0"):
        load("generator/demo", [stream])
    load("generator/demo", [stream, "callbacks.metrics_every=0"])
