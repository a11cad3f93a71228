"""Fixed samples: drawn by the run's seed, whatever the batches and ranks; of streams the first ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from data_shards import make_set
from embedding_cases import HashEncoder

from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule
from switti.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_set(tmp_path, [5, 4, 3], damaged=("s1n2",))
    make_set(tmp_path, [2], "validation")
    return tmp_path


def module(folder: Path, seed: int = 0, encoder: Any = None, **settings: Any) -> ShardDataModule:
    paths = {"train": f"{folder}/train-*.tar", "validation": f"{folder}/validation-*.tar"}
    defaults = {"batch_size": 4, "workers": 0, "max_bad_fraction": 0.5, "crop": "random"}
    return ShardDataModule(
        DataConfig(**(paths | defaults | settings)), seed=seed, resolution=8, encoder=encoder
    )


def test_they_depend_on_the_seed_alone(folder: Path) -> None:
    first, other = module(folder).fixed_batch(4), module(folder, batch_size=8, workers=1).fixed_batch(4)
    assert len(set(first["key"])) == 4 and other["key"] == first["key"]
    for name in ("image", "seed", "crop"):
        assert torch.equal(other[name], first[name])
    assert {tuple(module(folder, seed).fixed_batch(4)["key"]) for seed in range(5)} != {tuple(first["key"])}


def test_more_of_them_begin_with_the_same_ones(folder: Path) -> None:
    assert module(folder).fixed_batch(6)["key"][:4] == module(folder).fixed_batch(4)["key"]


def test_nothing_is_dropped(folder: Path) -> None:
    batch = module(folder, caption_dropout=1.0).fixed_batch(4)
    assert not batch["dropped"].any() and all(caption.startswith("caption ") for caption in batch["caption"])


def test_all_readable_ones_if_there_are_not_more(folder: Path) -> None:
    keys = module(folder).fixed_batch(100)["key"]
    assert len(set(keys)) == len(keys) == 11
    assert not any("s1n2" in key for key in keys)


def test_captions_are_embedded_by_the_run_s_encoder(folder: Path) -> None:
    encoder = HashEncoder()
    batch = module(folder, encoder=encoder).fixed_batch(3)
    assert torch.equal(batch["pooled"], encoder.encode(batch["caption"]).pooled_BP)


def test_of_a_stream_they_are_the_first_ones(folder: Path) -> None:
    stream = f"pipe:cat {folder}/train-00000{{1,2}}.tar"
    batch = module(folder, train=stream).fixed_batch(5)
    assert [key.rpartition("/")[2] for key in batch["key"]] == ["s1n0", "s1n1", "s1n3", "s2n0", "s2n1"]
    assert torch.equal(module(folder, train=stream, batch_size=8).fixed_batch(5)["image"], batch["image"])


def test_a_stream_that_fails_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: stream failed: .*"):
        module(folder, train="pipe:false", stream_retries=0).fixed_batch(2)
