"""Targets of the data: images, shards, captions and tables, prepared folders, embeddings, indices of shards."""

import csv
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding_cases import LENGTH, POOLED, WIDTH, HashEncoder
from fuzz_campaign import SilentError, Target
from fuzz_mutations import (
    Chance,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_tar,
    mutate_text,
    mutate_zip,
)
from PIL import Image

from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule
from datamodules.embed_shards import embed_shards
from datamodules.images import BadImageError, decode
from datamodules.prepare.sources import list_source
from datamodules.shards.embedding_file import EncoderIdentity
from datamodules.shards.embeddings import EmbeddingStore, MissingEmbeddingError, pad
from datamodules.shards.index import ShardReader, load_index
from datamodules.shards.members import CAPTION, decode_caption
from datamodules.shards.samples import Framing, make_sample
from datamodules.shards.stream_samples import StoredSample, stored_samples
from datamodules.shards.tar import CorruptTarError, StreamSource
from experiments import prepare
from switti.errors import UserError

SIDE = 8


def image(seed: int, width: int = 12, height: int = 10, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def members(count: int, start: int = 0) -> dict[str, bytes]:
    """Members of a shard: images, captions and sizes."""
    found: dict[str, bytes] = {}
    for number in range(start, start + count):
        found[f"s{number}.png"] = encoded(image(number), "PNG")
        found[f"s{number}.txt"] = f"caption {number}".encode()
        found[f"s{number}.json"] = json.dumps({"height": 100, "width": 120}).encode()
    return found


class Images(Target):
    """Bytes of an image → pixels."""

    name = "images"
    refusals = (BadImageError,)

    def build(self, home: Path) -> None:
        self.originals = [
            encoded(image(1, 40, 30, mode), kind, **options)
            for mode, kind, options in (
                ("RGB", "PNG", {}), ("RGBA", "PNG", {}), ("P", "PNG", {}), ("L", "PNG", {}), ("1", "PNG", {}),
                ("LA", "PNG", {}), ("RGB", "JPEG", {}), ("CMYK", "JPEG", {}), ("L", "JPEG", {"progressive": True}),
                ("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True}), ("P", "GIF", {}), ("RGB", "BMP", {}),
                ("RGB", "TIFF", {}), ("RGB", "TIFF", {"compression": "tiff_lzw"}), ("CMYK", "TIFF", {}),
                ("RGB", "TIFF", {"compression": "jpeg"}), ("RGB", "AVIF", {}), ("RGB", "PPM", {}), ("RGB", "TGA", {}),
                ("RGB", "EPS", {}), ("RGB", "ICO", {}),
            )
        ]  # fmt: skip
        deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))
        floats = Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40))
        frames = [image(2, 20, 20, "RGB"), image(3, 20, 20, "RGB")]
        self.originals += [encoded(deep, "PNG"), encoded(deep, "TIFF"), encoded(floats, "TIFF")]
        self.originals += [
            encoded(frames[0], kind, save_all=True, append_images=frames[1:])
            for kind in ("WEBP", "GIF", "PNG", "TIFF")
        ]
        self.framings = [Framing(side, 512, True, 0.0) for side in (4, 16, 64)]

    def mutate(self, chance: Chance, folder: Path) -> None:
        data = chance.choice(self.originals)
        words = (
            b"IHDR",
            b"IDAT",
            b"tRNS",
            b"PLTE",
            b"\xff\xd8",
            b"\xff\xc0",
            b"\xff\xda",
            b"VP8X",
            b"II*\x00",
            b"MM\x00*",
            b"%!PS",
        )
        data = self._large_png(chance, data) if chance.random() < 0.1 else mutate_bytes(chance, data, words)
        (folder / "image").write_bytes(data)

    @staticmethod
    def _large_png(chance: Chance, data: bytes) -> bytes:
        """Other sides in the header, with its checksum right."""
        import struct
        import zlib

        if not data.startswith(b"\x89PNG"):
            return data[: chance.randrange(len(data))]
        sides = (0, 1, 2, 40, 10_000, 30_000, 65_536, 10**6, 2**31 - 1)
        header = struct.pack(">II", chance.choice(sides), chance.choice(sides)) + data[24:29]
        return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]

    def read(self, folder: Path) -> None:
        data = (folder / "image").read_bytes()
        picture = decode(data)
        if picture.mode != "RGB" or min(picture.size) < 1:
            raise SilentError(f"decoded to {picture.mode} of {picture.size}")
        for framing in self.framings:
            sample = make_sample(data, "c", None, "k", 1, framing)
            if sample.image.shape != (framing.side, framing.side, 3) or sample.image.dtype != np.uint8:
                raise SilentError(f"a sample of shape {sample.image.shape}")
            height, width, top, left = sample.crop
            if min(height, width) not in (511, 512) or not (0 <= top <= height and 0 <= left <= width):
                raise SilentError(f"crop condition {sample.crop}")


def data_module(folder: Path, **settings: Any) -> ShardDataModule:
    shards = f"{folder}/*.tar"
    defaults = {"batch_size": 2, "workers": 0, "max_bad_fraction": 1.0, "caption_dropout": 0.0}
    config = DataConfig(train=shards, validation=shards, **(defaults | settings))
    config.validate("data")
    return ShardDataModule(config, seed=1, resolution=SIDE)


class Shards(Target):
    """Tars of samples → indexed, and every sample read."""

    name = "shards"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        plain = members(3)
        dotted = {f"a.b.{name}": data for name, data in members(2).items()}
        nested = {f"folder/{name}": data for name, data in members(2).items()}
        long_names = {f"{'n' * 120}{name}": data for name, data in members(2).items()}
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        self.originals = [tar_of(plain, kind) for kind in formats]
        self.originals += [
            tar_of(content, kind) for kind in formats[1:] for content in (dotted, nested, long_names)
        ]

    def mutate(self, chance: Chance, folder: Path) -> None:
        data = chance.choice(self.originals)
        if chance.random() < 0.2:
            content = members(2)
            name = chance.choice(sorted(content))
            if name.endswith(".json"):
                content[name] = mutate_json(chance, {"height": 100, "width": 120, "captions": ["a", "b"]})
            elif name.endswith(".txt"):
                content[name] = mutate_text(chance, "caption a")
            else:
                content[name] = mutate_bytes(chance, content[name])
            data = tar_of(content)
        else:
            data = mutate_tar(chance, data)
        (folder / "train-000000.tar").write_bytes(data)

    def read(self, folder: Path) -> None:
        path = folder / "train-000000.tar"
        module = data_module(folder)
        module.setup("fit")
        seen: list[tuple[str, str]] = []
        for batch in module.val_dataloader():
            if batch["image"].shape[1:] != (3, SIDE, SIDE) or not batch["image"].isfinite().all():
                raise SilentError(f"images of shape {list(batch['image'].shape)}")
            seen += zip(batch["key"], batch["caption"], strict=True)
        for _ in range(2):
            next(iter(module.train_dataloader()))
        self._compare(path, seen)
        # From the index that is now beside the shard: the same.
        again = data_module(folder)
        again.setup("fit")
        if [key for batch in again.val_dataloader() for key in batch["key"]] != [key for key, _ in seen]:
            raise SilentError("the stored index gives other samples")

    @staticmethod
    def _compare(path: Path, seen: list[tuple[str, str]]) -> None:
        """Captions against an independent reader's, where both read the whole file and a caption is plain."""
        texts: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    stream = tar.extractfile(member) if member.isreg() else None
                    if stream is not None:
                        texts[f"train-000000/{member.name}"] = stream.read()
        except (tarfile.TarError, OSError, ValueError, EOFError, MemoryError, OverflowError):
            return
        for key, caption in seen:
            if "\x00" in caption or "\ufeff" in caption:
                raise SilentError(f"caption of {key}: {caption!r}")
            content = texts.get(f"{key}.txt", b"\xff")
            if content.isascii() and b"\x00" not in content and content.decode().strip() != caption:
                raise SilentError(f"{key} has caption {caption!r}, the tar holds {content!r}")


class Streams(Target):
    """The same tars read from front to back."""

    name = "streams"
    refusals = (UserError, OSError, CorruptTarError)

    def build(self, home: Path) -> None:
        self.shards = Shards()
        self.shards.build(home)

    def mutate(self, chance: Chance, folder: Path) -> None:
        self.shards.mutate(chance, folder)

    def read(self, folder: Path) -> None:
        path = folder / "train-000000.tar"
        with path.open("rb") as stream:
            samples = [
                s for s in stored_samples(StreamSource(stream), path.stem) if isinstance(s, StoredSample)
            ]
        # Read forward, the same samples come with the same captions as by random access.
        module = data_module(folder)
        module.setup("fit")
        shards = module._shards("train").shards
        indexed = {key: (n, row) for n, index in enumerate(shards) for row, key in enumerate(index.keys)}
        reader = ShardReader(shards)
        for sample in samples:
            place = indexed.get(sample.key)
            if place is None or reader.caption(*place) != decode_caption(sample.contents[CAPTION]):
                raise SilentError(f"read forward, {sample.key} is another sample")


class Tables(Target):
    """Folders with captions, tables and COCO files → listed items."""

    name = "tables"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        self.home = home
        rows = [
            (f"i{n}.png", text)
            for n, text in enumerate(("a cat", "un été", 'say "x"', "a, b", "two\nlines", "猫"))
        ]
        for n in range(6):
            image(n).save(home / f"i{n}.png")
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("file", "caption"), *rows])
        lines = [json.dumps({"file": name, "caption": caption}) for name, caption in rows]
        self.texts = {
            "t.csv": text.getvalue(),
            "t.tsv": text.getvalue().replace('"a, b"', "a b").replace(",", "\t"),
            "t.jsonl": "\n".join(lines) + "\n",
        }
        self.coco = {
            "images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(rows)],
            "annotations": [{"image_id": n, "caption": caption} for n, (_, caption) in enumerate(rows)],
        }

    def mutate(self, chance: Chance, folder: Path) -> None:
        for path in sorted(self.home.glob("*.png")):
            shutil.copy(path, folder)
        kind = chance.choice((*self.texts, "t.json", "folder"))
        words = (
            b"file",
            b"caption",
            b'"',
            b",",
            b"\t",
            b"i0.png",
            b"../i0.png",
            b"/etc/passwd",
            b"null",
            b"[",
            b"]",
            b"{",
            b"}",
            b"NaN",
        )
        if kind == "folder":
            for n in range(6):
                (folder / f"i{n}.txt").write_bytes(
                    mutate_text(chance, "a caption\n") if n < 2 else b"a caption"
                )
        elif kind == "t.json":
            (folder / kind).write_bytes(mutate_json(chance, self.coco))
        elif kind == "t.jsonl" and chance.random() < 0.7:
            lines = self.texts[kind].splitlines()
            place = chance.randrange(len(lines))
            data = mutate_json(chance, json.loads(lines[place]))
            parts = [line.encode() for line in lines]
            (folder / kind).write_bytes(
                b"\n".join([*parts[:place], data.replace(b"\n", b" "), *parts[place + 1 :]])
            )
        else:
            (folder / kind).write_bytes(mutate_text(chance, self.texts[kind], words))

    def read(self, folder: Path) -> None:
        table = next((path for path in folder.glob("t.*")), None)
        images = folder if table is not None and table.suffix == ".json" else None
        listing = list_source(table or folder, images, "file", "caption")
        for item in listing.items:
            for caption in item.captions:
                if not caption.strip() or any(mark in caption for mark in ("\x00", "\ufeff")):
                    raise SilentError(f"caption {caption!r}")
                caption.encode()
            if caption_of_python(item.captions):
                raise SilentError(f"captions {item.captions!r}")
            json.dumps([item.key, item.origin, item.group, item.digest_text()]).encode()
        if not listing.items and not listing.skipped and (folder / "i0.txt").exists():
            raise SilentError("images vanished without a count")


def caption_of_python(captions: Any) -> bool:
    """Whether one is the way in which Python prints a container."""
    return any(caption.startswith(("['", "{'")) for caption in captions)


class Prepared(Target):
    """`prepare` on a folder with damage, then everything that it wrote."""

    name = "prepared"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        self.images = Images()
        self.images.build(home)

    def mutate(self, chance: Chance, folder: Path) -> None:
        source = folder / "source"
        source.mkdir()
        suffixes = (
            ".png",
            ".jpg",
            ".webp",
            ".gif",
            ".tif",
            ".bmp",
            ".PNG",
            ".jpeg",
            ".avif",
            ".jfif",
            ".heic",
        )
        for number in range(4):
            name = chance.choice(("a", "b b", "c.d", "é", "x" * 100, "[e]", "-f", "g\n")) + str(number)
            data = chance.choice(self.images.originals)
            data = mutate_bytes(chance, data) if chance.random() < 0.5 else data
            (source / f"{name}{chance.choice(suffixes)}").write_bytes(data)
            if chance.random() < 0.9:
                (source / f"{name}.txt").write_bytes(mutate_text(chance, f"caption {number}", ()))
        (source / "ok.png").write_bytes(encoded(image(7), "PNG"))
        (source / "ok.txt").write_bytes(b"fine")

    def read(self, folder: Path) -> None:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["--size", "8", "--workers", "1", "--shard-size", "2", "--validation-fraction", "0.2"]
        code = prepare.main([str(folder / "source"), "--out", str(out), *arguments])
        manifest = json.loads((out / "manifest.json").read_text())
        if code != 0 or (out / ".preparing").exists():
            raise SilentError(f"code {code}")
        for row in manifest["shards"]:
            data = (out / row["name"]).read_bytes()
            if (
                hashlib.sha256(data).hexdigest() != row["sha256"]
                or len(load_index(out / row["name"])) != row["samples"]
            ):
                raise SilentError(f"{row['name']} differs from the manifest")
        module = data_module(out, max_bad_fraction=0.0)
        module.setup("fit")
        read = sum(len(batch["key"]) for batch in module.val_dataloader())
        if read != sum(manifest["samples"].values()):
            raise SilentError(f"{read} samples of {manifest['samples']}")


class Embeddings(Target):
    """Side files of embeddings, their manifest and the empty caption's."""

    name = "embeddings"
    refusals = (UserError, MissingEmbeddingError)

    def build(self, home: Path) -> None:
        self.home, encoder = home, HashEncoder()
        for number in range(2):
            (home / f"train-{number:06d}.tar").write_bytes(tar_of(members(3, 3 * number)))
        identity = EncoderIdentity("hash", encoder.fingerprint, WIDTH, POOLED, LENGTH)
        indices = [load_index(path) for path in sorted(home.glob("*.tar"))]
        embed_shards(indices, encoder, identity, home / "embeddings" / identity.folder, 2)  # type: ignore[arg-type]
        self.store = next((home / "embeddings").iterdir())

    def mutate(self, chance: Chance, folder: Path) -> None:
        shutil.copytree(self.home, folder, dirs_exist_ok=True)
        store = folder / "embeddings" / self.store.name
        files = sorted(store.iterdir())
        for path in chance.sample(files, chance.randint(1, 2)):
            kind = chance.randrange(10)
            if kind == 0:
                path.unlink()
            elif kind == 1:
                path.write_bytes((self.store / chance.choice(files).name).read_bytes())
            elif path.suffix == ".json":
                path.write_bytes(mutate_json(chance, json.loads(path.read_bytes())))
            elif kind < 6:
                self._change_values(chance, path)
            else:
                path.write_bytes(mutate_safetensors(chance, path.read_bytes()))

    @staticmethod
    def _change_values(chance: Chance, path: Path) -> None:
        """A well-formed file with other numbers."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(path, "pt") as stream:
            metadata = stream.metadata()
            tensors = {key: stream.get_tensor(key).clone() for key in stream.keys()}  # noqa: SIM118
        key = chance.choice(sorted(tensors))
        value = tensors[key]
        changes = [
            lambda v: v.flip(0), lambda v: v[:-1], lambda v: v[:0], lambda v: -v.double(), lambda v: v.double(),
            lambda v: v.unsqueeze(0), lambda v: v.float() + float("nan"), lambda v: v + 1, lambda v: v * 1000,
            lambda v: v[..., :-1], lambda v: v.to(torch.int64), lambda v: torch.cat([v, v]),
        ]  # fmt: skip
        tensors[key] = chance.choice(changes)(value).contiguous()
        if chance.random() < 0.2 and metadata:
            keys = json.loads(metadata["keys"])
            metadata["keys"] = json.dumps(
                chance.choice((keys[::-1], keys[:-1], [], keys * 2, "x", [1, 2, 3]))
            )
        save_file(tensors, path, metadata=metadata)

    def read(self, folder: Path) -> None:
        encoder = HashEncoder()
        shards = [load_index(path) for path in sorted(folder.glob("*.tar"))]
        store = EmbeddingStore([str(folder / "embeddings")], shards, encoder.fingerprint)
        captions = [[f"caption {number}" for number in range(3 * s, 3 * s + 3)] for s in range(2)]
        expected = [("", store.null)]
        expected += [(captions[s][r], store.read(s, r)) for s in range(2) for r in range(3)]
        for caption, (tokens, pooled) in expected:
            states, wanted = encoder.one(caption)
            got, also = torch.as_tensor(tokens).float(), torch.as_tensor(pooled)
            if not (got.equal(states) and also.shape == wanted.shape and also.allclose(wanted)):
                raise SilentError(f"another embedding than that of {caption!r}")
        batch = pad([pair for _, pair in expected], store.identity.max_length)
        if not (batch["text_mask"].sum() == sum(len(tokens) for _, (tokens, _) in expected)):
            raise SilentError("tokens are lost on padding")


class Indices(Target):
    """The stored index beside a shard: damaged, it is made again."""

    name = "indices"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        self.home = home
        (home / "train-000000.tar").write_bytes(tar_of(members(3)))
        self.expected = load_index(home / "train-000000.tar")
        self.side = next(path for path in home.iterdir() if path.suffix != ".tar")

    def mutate(self, chance: Chance, folder: Path) -> None:
        shutil.copy2(self.home / "train-000000.tar", folder)
        data = self.side.read_bytes()
        zipped = data[:2] == b"PK"
        data = (
            mutate_zip(chance, data, "x") if zipped and chance.random() < 0.6 else mutate_bytes(chance, data)
        )
        (folder / self.side.name).write_bytes(data)

    def read(self, folder: Path) -> None:
        found = load_index(folder / "train-000000.tar")
        same = found.keys == self.expected.keys and all(
            np.array_equal(getattr(found, name), getattr(self.expected, name))
            for name in ("offsets_N3", "sizes_N3", "digests_N32")
        )
        if not same:
            raise SilentError("a damaged index was believed")
