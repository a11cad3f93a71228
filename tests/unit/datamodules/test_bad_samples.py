"""Bad samples: replaced, counted, limited, the same after a resume; streams that fail."""

import functools
import http.server
import io
import json
import logging
import os
import tarfile
import threading
import time
from pathlib import Path

import pytest
from batch_cases import module, rows, take
from data_shards import make_set, make_shard, png

from datamodules.datamodule import ShardDataModule
from datamodules.loader import BadSampleCount
from datamodules.shards import streams
from datamodules.shards.bad_samples import BadSample
from datamodules.shards.index import load_index
from switti.errors import UserError


def keys_of(batches: list[dict]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def lenient(folder: Path, **settings) -> ShardDataModule:
    return module(folder, **({"max_bad_fraction": 1.0} | settings))


def kinds(data: ShardDataModule, batches: int) -> dict[str, int]:
    """Kinds of damage that a watcher of so many batches claims."""
    data.watched = True
    take(data, batches)
    found: dict[str, int] = {}
    for _ in range(batches):
        for damage in data.bad_samples.claim()[1]:
            found[damage.kind] = found.get(damage.kind, 0) + 1
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_set(tmp_path, [4, 3, 5])
    make_set(tmp_path, [3], "validation")
    return tmp_path


def cut(path: Path, member: int) -> None:
    """The shard ends in the middle of the data of that member; samples have three members each."""
    with tarfile.open(path) as tar:
        end = tar.getmembers()[member].offset_data + 1
    with path.open("rb+") as stream:
        stream.truncate(end)


# ---- stand-ins ----------------------------------------------------------------------------------------------------


def test_others_stand_in_and_everything_else_stays_in_place(tmp_path: Path) -> None:
    make_set(tmp_path / "whole", [4, 3, 5])
    make_set(tmp_path / "broken", [4, 3, 5], damaged=("s0n1", "s2n4"))
    for name in ("whole", "broken"):
        make_set(tmp_path / name, [1], "validation")
    expected = keys_of(take(lenient(tmp_path / "whole"), 6))
    found = keys_of(take(lenient(tmp_path / "broken"), 6))
    damaged = {"train-000000/s0n1", "train-000002/s2n4"}
    for before, now in zip(expected, found, strict=True):
        assert (now == before) != (before in damaged) and now not in damaged


@pytest.mark.parametrize("world_size", [1, 2])
def test_stand_ins_are_the_same_after_a_resume_and_on_other_ranks(tmp_path: Path, world_size: int) -> None:
    make_set(tmp_path, [4, 3, 5], damaged=("s0n1", "s2n4", "s1n0"))
    make_set(tmp_path, [1], "validation")
    whole = rows(take(lenient(tmp_path, workers=2), 8))
    state = {"consumed": 12, "samples": 12, "shards": lenient(tmp_path)._shards("train").listing}
    shared = []
    for rank in range(world_size):
        data = lenient(tmp_path, rank=rank, world_size=world_size)
        data.setup("fit")
        data.load_state_dict(json.loads(json.dumps(state)))
        shared.append(take(data, 5))
    joined = [row for step in range(5) for rank in shared for row in rows([rank[step]])]
    assert joined == whole[12:]


def test_a_shard_that_disappears_is_stood_in_for_and_keeps_its_place(folder: Path) -> None:
    """First in the middle of a run, with a reader that opens its files one at a time; then on resume."""
    expected = keys_of(take(lenient(folder), 9))
    data = lenient(folder)
    data.setup("fit")
    data.training_set.samples.reader.files.most = 1
    data.watched = True
    batches, found = iter(data.train_dataloader()), []
    for step in range(6):
        found += next(batches)["key"]
        data.advance()
        if step == 2:
            (folder / "train-000001.tar").unlink()
            data.training_set.samples.reader.close()
    state = json.loads(json.dumps(data.state_dict()))
    assert state["consumed"] == 24
    resumed = lenient(folder)
    resumed.setup("fit")
    assert resumed._order.samples == 9
    resumed.load_state_dict(state)
    found += keys_of(take(resumed, 3))
    assert found[:12] == expected[:12]
    gone = [key.startswith("train-000001") for key in expected]
    assert sum(gone[12:]) == 6
    for before, now, missing in zip(expected[12:], found[12:], gone[12:], strict=True):
        assert (now == before) != missing and not now.startswith("train-000001")
    claimed = [damage for _ in range(6) for damage in data.bad_samples.claim()[1]]
    assert [damage.kind for damage in claimed] == ["missing_shard"] * 3
    assert {damage.shard for damage in claimed} == {"train-000001"}


def test_a_shard_that_is_cut_off_keeps_its_places(folder: Path) -> None:
    expected = keys_of(take(lenient(folder), 6))
    data = lenient(folder)
    take(data, 2)
    state = data.state_dict()
    cut(folder / "train-000002.tar", 9)  # samples 3 and 4 are lost, the picture of 3 half there
    resumed = lenient(folder)
    resumed.setup("fit")
    assert resumed._order.samples == 10
    resumed.load_state_dict(state)
    found = keys_of(take(resumed, 4))
    lost = {"train-000002/s2n3", "train-000002/s2n4"}
    for before, now in zip(expected[8:], found, strict=True):
        assert (now == before) != (before in lost) and now not in lost


def test_a_new_shard_waits_for_a_new_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = keys_of(take(lenient(folder), 6))
    data = lenient(folder)
    take(data, 2)
    state = data.state_dict()
    make_shard(folder / "train-000009.tar", ["new"])
    resumed = lenient(folder)
    resumed.setup("fit")
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state)
    assert "train-000009" in caplog.text and "are skipped" in caplog.text
    assert keys_of(take(resumed, 4)) == expected[8:]


def test_a_shard_cut_off_under_an_open_reader_gives_no_half_captions(folder: Path) -> None:
    data = lenient(folder)
    data.setup("fit")
    reader = data.training_set.samples.reader
    assert reader.caption(2, 4) == "caption s2n4"
    with tarfile.open(folder / "train-000002.tar") as tar:
        caption = next(m for m in tar.getmembers() if m.name == "s2n4.txt")
    os.truncate(folder / "train-000002.tar", caption.offset_data + 5)
    damage = data.training_set.samples.read(2, 4, 0)
    assert isinstance(damage, BadSample) and damage.kind == "truncated_shard"


# ---- what is known from the beginning -----------------------------------------------------------------------------


def shard_with_gaps(path: Path) -> Path:
    """Ten samples; s0n3 has no caption, s0n4 and s0n5 no picture."""
    with tarfile.open(path, "w") as tar:
        for i in range(10):
            for suffix, data in (("png", png(i)), ("txt", b"caption")):
                if (suffix, i) in (("txt", 3), ("png", 4), ("png", 5)):
                    continue
                member = tarfile.TarInfo(f"s0n{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_losses_at_the_beginning_by_kind(folder: Path) -> None:
    shard_with_gaps(folder / "train-000003.tar")
    cut(folder / "train-000002.tar", 9)
    (folder / "train-000004.tar").write_bytes(b"<html>not found</html>" * 100)
    data = lenient(folder, train=f"{folder}/train-{{000000..000005}}.tar")
    data.setup("fit")
    losses = {(loss.kind, loss.shard): loss.samples for loss in data.missing_samples}
    assert losses == {
        ("missing_caption", "train-000003"): 1,
        ("missing_picture", "train-000003"): 2,
        # four shards hold 4, 3, 3 and 7 samples: 4 on average
        ("truncated_shard", "train-000002"): 1,
        ("unreadable_shard", "train-000004"): 4,
        ("missing_shard", "train-000005"): 4,
    }
    again = lenient(
        folder, train=f"{folder}/train-{{000000..000005}}.tar"
    )  # indices come from beside the shards
    again.setup("fit")
    assert again.missing_samples == data.missing_samples
    assert len(take(data, 5)) == 5


def test_too_many_losses_stop_before_training_with_a_list(folder: Path) -> None:
    shard_with_gaps(folder / "train-000003.tar")
    with pytest.raises(
        UserError, match=r"data\.train: .*000003.*1 samples without caption.*max_bad_fraction=0\.1"
    ):
        module(folder, max_bad_fraction=0.1).setup("fit")
    module(folder, max_bad_fraction=0.2).setup("fit")  # 3 of 22
    with pytest.raises(
        UserError, match=r"data\.train: .*no shard .*train-000004\.tar \(about 8 of 27 samples"
    ):
        module(folder, train=f"{folder}/train-{{000000..000004}}.tar").setup("fit")  # 3 and a whole one of 5


def test_a_hole_in_the_middle_is_not_taken_for_the_end(folder: Path) -> None:
    path = folder / "train-000002.tar"
    with tarfile.open(path) as tar:
        begin = tar.getmembers()[6].offset
    with path.open("rb+") as stream:
        stream.seek(begin)
        stream.write(bytes(1024))
    assert len(load_index(path, salvage=True)) == 2
    with pytest.raises(UserError, match="truncated or corrupt at byte"):
        load_index(path)


def test_repaired_shards_are_indexed_anew(folder: Path) -> None:
    path = folder / "train-000002.tar"
    content = path.read_bytes()
    cut(path, 9)
    assert len(load_index(path, salvage=True)) == 3
    path.write_bytes(content)
    assert len(load_index(path)) == 5


# ---- counting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_belong_to_the_batches_that_were_trained_on(tmp_path: Path, workers: int) -> None:
    make_set(tmp_path, [8], damaged=("s0n2", "s0n3", "s0n7"))
    make_set(tmp_path, [1], "validation")
    assert kinds(lenient(tmp_path, batch_size=8, workers=workers), 1) == {"undecodable_picture": 3}
    assert kinds(lenient(tmp_path, batch_size=8, workers=workers), 3) == {"undecodable_picture": 9}


def test_the_limit_is_a_share_of_all_that_was_read() -> None:
    count = BadSampleCount(0.1, samples=50)
    damage = BadSample("a", "a/x", "torn")
    for _ in range(5):
        count.add(10, [damage])
    with pytest.raises(
        UserError, match=r"6 of 59 samples are missing or corrupt.*max_bad_fraction=0\.1: a/x: torn"
    ):
        count.add(9, [damage])
    BadSampleCount(0.0, samples=50, watched=True).add(1, [damage])  # the watcher judges


def test_a_fault_of_the_disk_is_tried_once_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lenient(folder)
    data.setup("fit")
    reader, pread, fails = data.training_set.samples.reader, os.pread, [OSError(116, "Stale file handle")]
    monkeypatch.setattr(os, "pread", lambda *a: (_ for _ in ()).throw(fails.pop()) if fails else pread(*a))
    assert reader.caption(0, 1) == "caption s0n1" and not fails
    fails += [OSError(5, "Input/output error")] * 2
    damage = data.training_set.samples.read(0, 1, 0)
    assert (
        isinstance(damage, BadSample)
        and damage.kind == "unreadable_shard"
        and "Input/output" in damage.reason
    )


# ---- streams ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none is made."""
    pauses: list[float] = []
    monkeypatch.setattr(streams.time, "sleep", pauses.append)
    return pauses


def read_stream(data: ShardDataModule, batches: int) -> tuple[list[str], list[BadSample]]:
    data.watched = True
    found = keys_of(take(data, batches))
    return found, [damage for _ in range(batches) for damage in data.bad_samples.claim()[1]]


def failing_first(folder: Path, times: int) -> str:
    """A command that breaks off in the third of four samples so many times before it gives everything."""
    tried, shard = folder / "tried", make_shard(folder / "large.tar", list("abcd"), size=(64, 64))
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[6].offset_data + 11_000  # of 12 288 bytes; tarfile reads 10 240 at a time
    script = folder / "flaky.sh"
    script.write_text(
        f"echo x >> {tried}\n[ $(wc -l < {tried}) -le {times} ] && {{ head -c {end} {shard}; exit 9; }}\ncat {shard}\n"
    )
    return f"pipe:sh {script}"


def test_a_stream_that_fails_goes_on_where_it_broke_off(folder: Path, quick_pauses: list[float]) -> None:
    data = lenient(folder, train=failing_first(folder, 3), batch_size=4)
    found, damages = read_stream(data, 1)
    # the shuffle buffer holds more than a pass, so that the first batch is drawn from whole passes
    assert {damage.kind for damage in damages} == {"stream_retry"} and len(damages) == 3
    assert "code 9" in damages[0].reason or "unexpected end" in damages[0].reason
    assert quick_pauses == [1.0, 2.0, 4.0]  # no attempt after the first brought anything new
    assert len(found) == 4


def test_no_sample_comes_twice_from_one_pass(folder: Path, quick_pauses: list[float]) -> None:
    data = lenient(folder, train=failing_first(folder, 2))
    dataset = data._stream_loader().dataset
    damages: list[BadSample] = []
    passed = [(content.key, len(damages)) for content in dataset._shard(dataset.urls[0], damages)]
    assert passed == [("a", 0), ("b", 2), ("c", 2), ("d", 2)] or passed == [
        ("a", 0),
        ("b", 0),
        ("c", 2),
        ("d", 2),
    ]


def test_pauses_grow_up_to_a_minute_and_then_the_source_has_failed(
    folder: Path, quick_pauses: list[float]
) -> None:
    with pytest.raises(UserError, match="stream failed: pipe:exit 4: the command ended with code 4"):
        take(lenient(folder, train="pipe:exit 4", stream_retries=8), 1)
    assert quick_pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_one_bad_stream_among_good_ones_is_left(folder: Path, quick_pauses: list[float]) -> None:
    urls = [f"pipe:cat {folder}/train-00000{i}.tar" for i in range(3)] + ["pipe:exit 4"]
    found, damages = read_stream(lenient(folder, train=urls, stream_retries=1), 5)
    assert len(found) == 20
    assert {damage.kind for damage in damages} == {"stream_retry", "failed_stream"}


def test_a_stream_that_stalls_is_a_failure(folder: Path, quick_pauses: list[float]) -> None:
    began = time.monotonic()
    shard = folder / "train-000000.tar"
    stalling = f"pipe:head -c 3000 {shard}; sleep 60"
    with pytest.raises(UserError, match=r"no byte for 0\.3 s"):
        take(lenient(folder, train=stalling, stream_retries=1, stream_timeout=0.3), 1)
    assert time.monotonic() - began < 20


def test_a_command_that_closes_its_output_and_goes_on_is_a_failure(
    folder: Path, quick_pauses: list[float]
) -> None:
    command = f"pipe:head -c 3000 {folder}/train-000000.tar; exec >&-; sleep 60"
    with pytest.raises(UserError, match="the command ended with code -9"):
        take(lenient(folder, train=command, stream_retries=1, stream_timeout=0.3), 1)


def test_a_stream_that_ends_between_members_is_no_whole_one(folder: Path) -> None:
    shard = folder / "train-000000.tar"
    with tarfile.open(shard) as tar:
        boundary = tar.getmembers()[6].offset
    with pytest.raises(UserError, match="without the mark of a tar's end"):
        take(lenient(folder, train=f"pipe:head -c {boundary} {shard}", stream_retries=0), 1)


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Refuses the first request and cuts the second answer short."""

    requests: list[str] = []  # noqa: RUF012 (shared on purpose)

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if len(self.requests) == 1:
            self.send_error(503)
        elif len(self.requests) == 2:
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


def test_http_is_tried_again(folder: Path, quick_pauses: list[float]) -> None:
    Flaky.requests.clear()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Flaky, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/train-000000.tar"
    dataset = lenient(folder, train=url)._stream_loader().dataset
    damages: list[BadSample] = []
    try:
        passed = [content.key for content in dataset._shard(url, damages)]
    finally:
        server.shutdown()
    assert passed == ["s0n0", "s0n1", "s0n2", "s0n3"]
    assert "503" in damages[0].reason and len(damages) == 2
