"""Batches: what is in them, that they do not depend on workers, ranks or interruptions, and what damage does."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from batch_cases import module, rows, take
from data_shards import make_set, make_shard, png
from PIL import Image
from safetensors.torch import load_file

from datamodules.images import decode, resize_shorter, square_crop
from datamodules.shards.samples import Framing, condition_of, make_sample
from datamodules.stable_seeds import sample_seed
from switti.errors import UserError
from switti.models.crop_embedding import center_crop_condition


@pytest.fixture
def folder(tmp_path):
    make_set(tmp_path, [4, 3, 5])
    make_set(tmp_path, [4, 3], "validation")
    return tmp_path


def test_batch_is_what_the_shard_holds(folder):
    batch = take(module(folder, caption_dropout=0.0, crop="center", crop_base=100), 1)[0]
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.float32
    for i, key in enumerate(batch["key"]):
        stem, name = key.split("/")
        assert stem.startswith("train-") and batch["caption"][i] == f"caption {name}"
        picture = Image.open(
            __import__("io").BytesIO(png(int(name.split("n")[1])))
        )  # 12 × 10 → 10 × 8 → 8 × 8
        small = np.asarray(picture.resize((10, 8), Image.Resampling.LANCZOS))[:, 1:9]
        expected = torch.from_numpy(small.astype(np.float64) / 127.5 - 1).permute(2, 0, 1)
        torch.testing.assert_close(batch["image"][i].double(), expected, atol=1e-6, rtol=0)
        assert batch["size"][i].tolist() == [100, 120]  # as the json says
        # By the original's size, not by that of the small copy, whose ratio is rounded.
        assert batch["crop"][i].tolist() == [100, 120, 0, 10]
        assert int(batch["seed"][i]) == sample_seed(5, 0, key)
    assert "text" not in batch and "damaged" not in batch


def test_workers_change_nothing(folder):
    assert rows(take(module(folder), 8)) == rows(take(module(folder, workers=2), 8))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_change_nothing(folder, world_size):
    one = rows(take(module(folder), 7))
    shared = [take(module(folder, rank, world_size), 7) for rank in range(world_size)]
    joined = [row for step in range(7) for rank in shared for row in rows([rank[step]])]
    assert joined == one


def test_accumulation_changes_nothing(folder):
    assert rows(take(module(folder, accumulate=2), 8)) == rows(take(module(folder), 4))


def test_every_epoch_has_every_sample_and_other_draws(folder):
    found = rows(take(module(folder), 6))  # 24 samples: two epochs of 12
    epochs = found[:12], found[12:]
    assert [len({row[0] for row in epoch}) for epoch in epochs] == [12, 12]
    seeds = [{row[0]: row[2] for row in epoch} for epoch in epochs]
    assert all(seeds[0][key] != seeds[1][key] for key in seeds[0])


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_continues_exactly(folder, stop, world_size):
    whole = rows(take(module(folder), 8))
    first = module(folder)
    take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    shards = [["train-000000", 4], ["train-000001", 3], ["train-000002", 5]]
    assert state == {"consumed": 4 * stop, "samples": 12, "shards": shards}
    continued = []
    for rank in range(world_size):
        data = module(folder, rank, world_size)
        data.load_state_dict(state)
        continued.append(take(data, 8 - stop))
    joined = [row for step in range(8 - stop) for rank in continued for row in rows([rank[step]])]
    assert joined == whole[4 * stop :]


def test_resume_from_any_integer(folder):
    """Also from positions that no batch of this size ends at: the global batch was another one before."""
    keys = [row[0] for row in rows(take(module(folder, batch_size=1), 36))]
    for consumed in range(0, 24, 5):
        data = module(folder, batch_size=3)
        data.load_state_dict({"consumed": consumed, "samples": 12})
        assert [row[0] for row in rows(take(data, 4))] == keys[consumed : consumed + 12]


def test_prefetched_samples_are_not_counted(folder):
    data = module(folder, workers=2)
    take(data, 3)
    assert data.consumed == 12 and data.epoch == 1


def test_other_data_on_resume_warns(folder):
    data = module(folder)
    data.setup("fit")
    with pytest.warns(UserWarning, match="had 99 samples"):
        data.load_state_dict({"consumed": 4, "samples": 99})


def test_seed_depends_on_run_epoch_and_key_alone():
    assert sample_seed(1, 2, "a/b") == sample_seed(1, 2, "a/b")
    others = [
        sample_seed(1, 2, "a/c"),
        sample_seed(1, 3, "a/b"),
        sample_seed(2, 2, "a/b"),
        sample_seed(12, 2, "a/b"),
    ]
    assert len({sample_seed(1, 2, "a/b"), *others}) == 5
    assert sample_seed(1, 22, "a/b") != sample_seed(12, 2, "a/b")
    assert all(0 <= sample_seed(0, 0, str(i)) < 2**63 for i in range(1000))
    assert torch.tensor(max(sample_seed(0, 0, str(i)) for i in range(1000))).dtype == torch.int64


def test_dropping_has_its_probability_and_crops_fill_the_range():
    framing = Framing(8, 8, random_crop=True, caption_dropout=0.25)
    picture = png(0, 16, 8)
    made = [make_sample(picture, "c", None, "k", sample_seed(0, 0, str(i)), framing) for i in range(2000)]
    dropped = np.mean([sample.dropped for sample in made])
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert all(sample.caption == ("" if sample.dropped else "c") for sample in made)
    lefts = np.bincount([sample.crop[3] for sample in made], minlength=9)
    assert lefts.min() > 0 and len(lefts) == 9
    whole = np.asarray(decode(picture))
    for sample in made[:50]:
        np.testing.assert_array_equal(sample.image, whole[:, sample.crop[3] : sample.crop[3] + 8])
    assert {sample.size for sample in made} == {(8, 16)}


def test_crop_box_and_condition_agree_in_place():
    assert square_crop(width=96, height=64, side=64, where=(0.0, 1.0)) == (32, 0, 96, 64)
    assert condition_of((64, 96), (0.0, 1.0), base=512) == (512, 768, 0, 256)


@pytest.mark.parametrize("base", [512, 1024])
def test_crop_condition_of_a_training_sample_is_the_published_one(base, golden_crops):
    """Golden sizes and conditions of the released weights, through the function that makes training samples."""
    sizes, conditions = golden_crops[base]
    framing = Framing(8, base, random_crop=False, caption_dropout=0.0)
    elsewhere = 0
    for (height, width), expected in zip(sizes, conditions, strict=True):
        scale = min(1.0, 64 / min(height, width))
        picture = png(0, max(1, round(width * scale)), max(1, round(height * scale)))
        meta = json.dumps({"height": height, "width": width}).encode()
        sample = make_sample(picture, "c", meta, "k", 0, framing)
        assert sample.size == (height, width)
        assert list(sample.crop) == expected
        factor = base / min(height, width)
        elsewhere += expected[:2] != [round(height * factor), round(width * factor)]
    assert elsewhere, "rounding instead of truncating would pass"
    # Known cases of float32 truncation to base − 1.
    assert condition_of((41, 41), (0.5, 0.5), 512)[:2] == (511, 511)


@pytest.fixture
def golden_crops(root):
    tensors = load_file(root / "tests/data/parity/functions.safetensors")
    sizes = tensors["crop.hw"].tolist()
    return {base: (sizes, tensors[f"crop.cond_base{base}"].tolist()) for base in (512, 1024)}


def test_center_offset_is_the_released_floor_for_all_sizes():
    longer = torch.arange(512, 8192)
    found = center_crop_condition(torch.full_like(longer, 512), longer, 512)
    torch.testing.assert_close(found[:, 3].long(), (longer - 512) // 2)


@pytest.mark.parametrize(
    "told",
    [
        None, b"", b"[]", b"3", b"{", b'{"height": 5}', b'{"height": -5, "width": 4}', b'{"height": 0, "width": 0}',
        b'{"height": Infinity, "width": 1}', b'{"height": NaN, "width": 1}', b'{"height": 1e30, "width": 1e30}',
        b'{"height": "16", "width": "8"}', b'{"height": true, "width": true}', b'{"height": [1], "width": {}}',
        b'{"height": 160, "width": 80}', b'{"height": 80, "width": 800}', b"[" * 5000, b"\xff\xfe",
        b'{"height": 100000000000000000000, "width": 200000000000000000000}',
    ],
)  # fmt: skip
def test_a_told_size_that_cannot_be_the_original_is_ignored(told):
    framing = Framing(8, 512, random_crop=False, caption_dropout=0.0)
    sample = make_sample(png(0, 16, 8), "c", told, "k", 0, framing)
    assert sample.size == (8, 16) and sample.crop == (512, 1024, 0, 256)
    believed = make_sample(png(0, 16, 8), "c", b'{"height": 403, "width": 800}', "k", 0, framing)
    assert believed.size == (403, 800)


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (7, 300), (20, 20)])
def test_resize_keeps_the_ratio_and_the_shorter_side(size):
    image = resize_shorter(Image.new("RGB", size), 16)
    assert min(image.size) == 16
    assert abs(max(image.size) / 16 - max(size) / min(size)) <= 0.5 / 16


def test_transparency_orientation_and_depth():
    def encoded(image, **options):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        return np.asarray(decode(buffer.getvalue()))

    assert (encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == 255).all()
    half = encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert abs(int(half[0, 0, 0]) - round(255 * 127 / 255)) <= 1
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert encoded(deep)[0, :, 0].tolist() == [0, 100, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    assert encoded(Image.new("RGB", (5, 3)), exif=exif).shape == (5, 3, 3)


def test_examples_come_in_batches_of_any_size(folder):
    """The same samples, so many at a time, without those that are damaged."""
    make_shard(folder / "train-000009.tar", ["x0", "x1", "x2"], damaged=("x0", "x1", "x2"))
    data = module(folder, max_bad_fraction=1.0)
    together = data.examples("train", 9)
    assert 0 < len(together["key"]) < 9
    for size in (1, 2, 4, 100):
        parts = list(data.example_batches("train", 9, size))
        assert all(len(part["key"]) <= size for part in parts)
        assert [key for part in parts for key in part["key"]] == together["key"]
        assert torch.equal(torch.cat([part["image"] for part in parts]), together["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_whole_centred_and_repeatable(folder, workers):
    data = module(folder, workers=workers, crop="random")
    data.setup("validate")
    passes = [list(data.val_dataloader()) for _ in range(2)]
    assert rows(passes[0]) == rows(passes[1])
    assert [len(b["key"]) for b in passes[0]] == [4, 3]
    assert [k for b in passes[0] for k in b["key"]] == [
        f"validation-{s:06d}/s{s}n{i}" for s, n in enumerate((4, 3)) for i in range(n)
    ]
    for batch in passes[0]:
        assert not batch["dropped"].any() and all(batch["caption"])
        assert batch["crop"].tolist() == [[512, 614, 0, 51]] * len(batch["key"])


def test_validation_among_ranks(folder):
    keys = []
    for rank in range(2):
        data = module(folder, rank, 2)
        data.setup("validate")
        batches = list(data.val_dataloader())
        assert len(batches) == 2
        keys += [key for batch in batches for key in batch["key"]]
    assert len(keys) == len(set(keys)) == 7


def test_damaged_pictures_are_replaced_counted_and_named_once(tmp_path, caplog):
    make_set(tmp_path, [10], damaged=("s0n2", "s0n3"))
    make_set(tmp_path, [3], "validation", damaged=("s0n1",))
    data = module(tmp_path, batch_size=5, max_bad_fraction=1.0, workers=2)
    with caplog.at_level(logging.WARNING, "datamodules.loader"):
        batches = take(data, 4)
    assert all(len(batch["key"]) == 5 for batch in batches)  # two epochs, batches of full size
    keys = [key for batch in batches for key in batch["key"]]
    assert not {"train-000000/s0n2", "train-000000/s0n3"} & set(keys)
    whole = {f"train-000000/s0n{i}" for i in range(10) if i not in (2, 3)}
    assert (
        whole == set(keys[:10]) == set(keys[10:])
    )  # each epoch: all of them, two of them once more (or one twice)
    assert len([r for r in caplog.records if "undecodable picture" in r.message]) == 1
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 2


def test_too_many_damaged_pictures_stop_with_their_names(tmp_path):
    make_set(tmp_path, [10], damaged=("s0n2", "s0n3"))
    make_set(tmp_path, [1], "validation")
    with pytest.raises(UserError, match=r"max_bad_fraction=0\.1.*train-000000/s0n[23]: not an image"):
        take(module(tmp_path, max_bad_fraction=0.1), 10)
    assert len(take(module(tmp_path, max_bad_fraction=0.5), 10)) == 10


def test_nothing_but_damage_stops(tmp_path):
    make_set(tmp_path, [3], damaged=("s0n0", "s0n1", "s0n2"))
    make_set(tmp_path, [1], "validation")
    with pytest.raises(UserError, match="no sample of a batch can be read"):
        take(module(tmp_path, max_bad_fraction=1.0), 1)


def test_what_is_missing_is_named(folder):
    with pytest.raises(UserError, match=r"data\.train='.*nowhere.*' matches no shard"):
        module(folder, train=f"{folder}/nowhere-*.tar").setup("fit")
    with pytest.raises(UserError, match=r"data\.validation: no shard"):
        module(folder, validation=f"{folder}/gone.tar").setup("fit")
    with pytest.raises(UserError, match=r"data\.batch_size=4 must be a multiple of 3 ranks"):
        module(folder, world_size=3).setup("fit")
    with pytest.raises(UserError, match="names no shards"):
        module(folder, train=[])


def test_equal_stems_in_two_folders(tmp_path):
    make_shard(tmp_path / "a" / "train-0.tar", ["x"])
    make_shard(tmp_path / "b" / "train-0.tar", ["x"])
    make_set(tmp_path, [1], "validation")
    batch = take(
        module(tmp_path, train=[f"{tmp_path}/{name}/train-0.tar" for name in "ab"], batch_size=2), 1
    )[0]
    assert sorted(batch["key"]) == ["a/train-0/x", "b/train-0/x"]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_through_a_pipe(folder, workers, caplog):
    stream = f"pipe:cat {folder}/train-{{000000..000002}}.tar"
    data = module(folder, train=stream, workers=workers)
    with caplog.at_level(logging.INFO):
        batches = take(data, 12)
    assert any("not exactly resumable" in record.message for record in caplog.records)
    keys = {key for batch in batches for key in batch["key"]}
    assert len(keys) > 4 and keys <= {f"train-{s:06d}/s{s}n{i}" for s in range(3) for i in range(5)}
    assert batches[0]["image"].shape == (4, 3, 8, 8) and data.epoch is None
    for batch in batches:
        for key, caption, dropped in zip(batch["key"], batch["caption"], batch["dropped"], strict=True):
            assert caption == ("" if dropped else f"caption {key.split('/')[1]}")


def test_ranks_draw_other_samples_from_a_stream(folder):
    stream = f"pipe:cat {folder}/train-{{000000..000002}}.tar"
    ranks = [rows(take(module(folder, rank, 2, train=stream), 3)) for rank in range(2)]
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("command", ["cat /nowhere/train-0.tar", "head -c 700 {shard}", "echo hello"])
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_stream_is_one_clear_error(folder, command, workers):
    stream = "pipe:" + command.format(shard=folder / "train-000000.tar")
    with pytest.raises(UserError, match="stream failed"):
        take(module(folder, train=stream, workers=workers, stream_retries=0), 2)


def test_streams_do_not_mix(folder):
    mixed = [f"pipe:cat {folder}/train-000000.tar", f"{folder}/train-000001.tar"]
    with pytest.raises(UserError, match="mixes streams"):
        take(module(folder, train=mixed), 1)
    with pytest.raises(UserError, match=r"data\.validation=.*stream"):
        module(folder, validation="pipe:cat x.tar").setup("fit")


def test_seeds_stay_on_the_host(folder) -> None:
    """Random streams start from them there; a device would have to be asked."""
    data = module(folder)
    batch = take(data, 1)[0]
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["seed"] is batch["seed"] and moved["image"].device.type == "meta"
