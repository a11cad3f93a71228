"""The index of a shard against tarfile; damaged and foreign shards; the side file."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
from data_shards import make_set, make_shard

from datamodules.shards.index import ShardReader, load_index
from datamodules.shards.open_files import OpenFiles
from datamodules.shards.shard_discovery import find_shards
from datamodules.shards.shard_paths import expand, unique_names
from switti.errors import UserError


def test_index_reads_what_tarfile_reads(tmp_path):
    path = make_shard(
        tmp_path / "a.tar", ["x", "folder/y", "z" * 150]
    )  # a name beyond the header's 100 bytes
    index = load_index(path)
    reader = ShardReader([index])
    with tarfile.open(path) as tar:
        for row, key in enumerate(["x", "folder/y", "z" * 150]):
            assert index.keys[row] == key
            assert reader.image(0, row) == tar.extractfile(f"{key}.png").read()
            caption = tar.extractfile(f"{key}.txt").read()
            assert reader.caption(0, row) == caption.decode().strip()
            assert reader.meta(0, row) == tar.extractfile(f"{key}.json").read()
            assert index.digests_N32[row].tobytes() == hashlib.sha256(caption).digest()


def test_side_file_is_used_until_the_shard_changes(tmp_path, monkeypatch):
    path = make_shard(tmp_path / "a.tar", ["x", "y"])
    first = load_index(path)
    assert (tmp_path / "a.tar.index.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.shards.index.build_index", lambda path: pytest.fail("indexed again"))
        again = load_index(path)
    assert again.keys == first.keys and np.array_equal(again.offsets_N3, first.offsets_N3)
    make_shard(path, ["x", "y", "new"])
    assert load_index(path).keys == ["x", "y", "new"]


def test_damaged_side_file_is_made_again(tmp_path):
    path = make_shard(tmp_path / "a.tar", ["x"])
    load_index(path)
    (tmp_path / "a.tar.index.safetensors").write_bytes(b"PK torn")
    assert load_index(path).keys == ["x"]


def test_folder_without_permission_keeps_the_index_in_memory(tmp_path, monkeypatch):
    path = make_shard(tmp_path / "a.tar", ["x"])

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("datamodules.shards.index.atomic_write", refuse)
    assert load_index(path).keys == ["x"]
    assert not (tmp_path / "a.tar.index.safetensors").exists()


@pytest.mark.parametrize("keep", [100, 512, 700, 1536, 2100, -1024 * 9])
def test_truncated_shard_is_named(tmp_path, keep):
    path = make_shard(tmp_path / "torn.tar", ["x", "y", "z"])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"torn\.tar"):
        load_index(path)


def test_shard_cut_between_members_is_no_whole_shard(tmp_path):
    path = make_shard(tmp_path / "torn.tar", ["x", "y"])
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:boundary])
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_index(path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100, b"\x1f\x8b compressed" * 100])
def test_foreign_file(tmp_path, content):
    path = tmp_path / "foreign.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"foreign\.tar"):
        load_index(path)


def test_shard_without_pairs_and_with_twins(tmp_path):
    path = tmp_path / "a.tar"
    text = tmp_path / "t.txt"
    text.write_text("hello")
    with tarfile.open(path, "w") as tar:
        tar.add(text, "x.txt")
    with pytest.raises(UserError, match="no image"):
        load_index(path)
    with tarfile.open(path, "w") as tar:
        tar.add(text, "x.txt")
        tar.add(text, "x.txt")
    with pytest.raises(UserError, match="twice"):
        load_index(path)


def test_expand(tmp_path):
    pattern = make_set(tmp_path, [1, 1, 1])
    names = [tmp_path / f"train-{i:06d}.tar" for i in range(3)]
    assert expand("data.train", [pattern]) == names
    assert expand("data.train", [str(tmp_path / "train-{000000..000002}.tar")]) == names
    assert expand("data.train", [str(names[1]), pattern]) == [names[1], names[0], names[2]]
    for bad in ("none-*.tar", "missing.tar", "train-{000000..000003}.tar", "", "train-{0..1.tar"):
        with pytest.raises(UserError, match=r"data\.train"):
            expand("data.train", [str(tmp_path / bad)])


@pytest.mark.parametrize("name", ["[new]", "{a,b}", "set*", "what?", "[new] {0..1} *", "{", "a]b["])
def test_what_exists_is_taken_as_it_is_written(tmp_path, name):
    pattern = make_set(tmp_path / name, [1, 1])
    names = [tmp_path / name / f"train-{i:06d}.tar" for i in range(2)]
    assert expand("data.train", [pattern]) == names
    assert expand("data.train", [str(tmp_path / name / "train-{000000..000001}.tar")]) == names
    (tmp_path / name / "train-[0].tar").write_bytes(b"")
    assert expand("data.train", [str(tmp_path / name / "train-[0].tar")]) == [
        tmp_path / name / "train-[0].tar"
    ]
    with pytest.raises(
        UserError, match=r"matches no shard; in a name that does not exist, \[ \], \* and \? stand for"
    ):
        expand("data.train", [str(tmp_path / name / "train-[1].tar")])
    assert find_shards("data.train", [str(names[0])], 0.0).shards[0].path == names[0]


@pytest.mark.parametrize(
    "pattern", ["a\0b", "x" * 5000, "/" + "y" * 300 + "/*.tar", "[", "{a,b", "**", "~nobody/x.tar"]
)
def test_odd_patterns_are_refused_in_words(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.train"):
        expand("data.train", [pattern])
    with pytest.raises(UserError, match=r"data\.train"):
        find_shards("data.train", [pattern], 0.0)


def test_names_take_folders_in_only_where_needed(tmp_path):
    a, b, c = tmp_path / "a" / "t-0.tar", tmp_path / "b" / "t-0.tar", tmp_path / "b" / "t-1.tar"
    assert unique_names([b, c]) == ["t-0", "t-1"]
    assert unique_names([a, b, c]) == ["a/t-0", "b/t-0", "b/t-1"]


def test_reader_with_few_open_files_and_through_pickle(tmp_path):
    make_set(tmp_path, [2, 2, 2])
    shards = [load_index(path) for path in sorted(tmp_path.glob("*.tar"))]
    few, many = ShardReader(shards, OpenFiles(1)), ShardReader(shards)
    for shard in (0, 1, 0, 2, 1):
        assert few.caption(shard, 1) == many.caption(shard, 1) == f"caption s{shard}n1"
    assert pickle.loads(pickle.dumps(few)).caption(2, 0) == "caption s2n0"


def test_digest_tells_contents_apart_wherever_they_lie(tmp_path):
    def digest(folder, keys, size=(12, 10)):
        for number, part in enumerate(keys):
            make_shard(tmp_path / folder / f"train-{number}.tar", part, size=size)
        return find_shards("data.train", [str(tmp_path / folder / "train-*.tar")], 0.0).digest

    first = digest("a", [["x", "y"], ["z"]])
    assert digest("b/c", [["x", "y"], ["z"]]) == first and len(first) == 16
    others = [
        digest("d", [["y", "x"], ["z"]]),
        digest("e", [["x", "y"], ["w"]]),
        digest("f", [["x", "y"]]),
        digest("g", [["x", "y"], ["z"]], size=(13, 11)),
    ]
    assert len({first, *others}) == 5
    assert digest("a", [["x", "y"], ["z"]], size=(13, 11)) == others[-1] != first  # made anew, in place
