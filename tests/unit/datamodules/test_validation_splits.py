"""Several validation splits: by the names of their shards, each with a loader of its own."""

import pytest
from batch_cases import module
from data_shards import make_set

from configs.build import grid_captions
from switti.errors import UserError


@pytest.fixture
def folder(tmp_path):
    make_set(tmp_path, [4, 3, 5])
    make_set(tmp_path, [5], "validation-pairs")
    make_set(tmp_path, [2, 1], "validation-concepts")
    return tmp_path


def keys_of(loader):
    return [key for batch in loader for key in batch["key"]]


def test_every_split_has_a_loader_of_its_shards(folder):
    data = module(folder)
    data.setup("fit")
    assert data.validation_splits == ["concepts", "pairs"]
    concepts, pairs = (keys_of(loader) for loader in data.val_dataloader())
    assert concepts == [
        f"validation-concepts-{s:06d}/s{s}n{i}" for s, n in enumerate((2, 1)) for i in range(n)
    ]
    assert pairs == [f"validation-pairs-000000/s0n{i}" for i in range(5)]
    assert data.contents["validation"]["samples"] == 8


def test_shards_without_a_split_make_one_loader_without_a_name(folder):
    for path in folder.glob("validation-*.tar"):
        path.unlink()
    make_set(folder, [4, 3], "validation")
    data = module(folder)
    data.setup("fit")
    assert data.validation_splits == []
    assert len(keys_of(data.val_dataloader())) == 7


def test_shards_without_a_split_stand_beside_named_ones(folder):
    make_set(folder, [2], "validation")
    data = module(folder)
    data.setup("fit")
    assert data.validation_splits == ["", "concepts", "pairs"]
    assert [len(keys_of(loader)) for loader in data.val_dataloader()] == [2, 3, 5]


def test_examples_come_from_the_split_that_is_named(folder):
    data = module(folder)
    assert all("validation-pairs" in key for key in data.examples("validation/pairs", 3)["key"])
    assert len(data.examples("validation", 100)["key"]) == 8
    with pytest.raises(
        UserError, match="no split validation/pears; there is validation/concepts, validation/pairs"
    ):
        data.examples("validation/pears", 3)


def test_sample_grids_show_training_captions_and_held_out_pairs(folder):
    data = module(folder)
    data.setup("fit")
    captions = grid_captions(data, 5)
    assert captions[:3] == data.examples("train", 3)["caption"]
    assert captions[3:] == data.examples("validation/pairs", 2)["caption"]
    for path in folder.glob("validation-pairs*"):
        path.unlink()
    data = module(folder)
    data.setup("fit")
    assert grid_captions(data, 3) == data.examples("validation", 3)["caption"]
