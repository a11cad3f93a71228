"""Tiny pictures and shards for the tests of the data, written with tarfile and Pillow alone."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, width: int = 12, height: int = 10) -> bytes:
    """A picture of noise that differs with the seed."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def make_shard(
    path: Path, keys: list[str], damaged: tuple[str, ...] = (), size: tuple[int, int] = (12, 10)
) -> Path:
    """A shard whose pictures are noise; the caption of sample k is 'caption k'; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, key in enumerate(keys):
            picture = b"no picture" if key in damaged else png(number, *size)
            meta = json.dumps({"width": size[0] * 10, "height": size[1] * 10}).encode()
            for suffix, data in (("png", picture), ("txt", f"caption {key}\n".encode()), ("json", meta)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def make_set(folder: Path, counts: list[int], split: str = "train", damaged: tuple[str, ...] = ()) -> str:
    """Shards of so many samples, keys s<shard>n<number>; the glob that finds them."""
    for shard, count in enumerate(counts):
        make_shard(folder / f"{split}-{shard:06d}.tar", [f"s{shard}n{i}" for i in range(count)], damaged)
    return str(folder / f"{split}-*.tar")
