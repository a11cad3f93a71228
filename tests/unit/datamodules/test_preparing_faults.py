"""Preparing what people have: odd names, wrong paths and targets, a full disk, processes that are killed."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from data_shards import png
from PIL import Image

from datamodules.prepare.prepare import Listing, Skipped
from datamodules.prepare.processes import ordered_map
from datamodules.prepare.writer import PreparedSample
from experiments.prepare import main
from switti.errors import UserError


def prepare(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def captions(out: Path) -> list[str]:
    return sorted(data.decode() for name, data in members(out).items() if name.endswith(".txt"))


def sources(out: Path) -> set[str]:
    return {json.loads(data)["source"] for name, data in members(out).items() if name.endswith(".json")}


def reasons(out: Path) -> dict[str, str]:
    with (out / "skipped.csv").open(newline="", encoding="utf-8") as stream:
        return {row["file"]: row["reason"] for row in csv.DictReader(stream)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        (folder / f"a{i}.png").write_bytes(png(i))
        (folder / f"a{i}.txt").write_text(f"caption {i}")
    return folder


# ---- folders ------------------------------------------------------------------------------------------------------


def test_everything_in_a_folder_is_read_or_named(images: Path, tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(png(20)))
    for name in ("b.JPG", "c.jfif", "d.avif", "e.Tiff"):
        picture.save(images / name, {"b": "JPEG", "c": "JPEG", "d": "AVIF", "e": "TIFF"}[name[0]])
        (images / f"{name[0]}.{'TXT' if name[0] == 'b' else 'txt'}").write_text(f"read {name[0]}")
    for name, data in [
        ("f.heic", b"x"), ("g.xyz", b"x"), ("h", b"x"), ("j.png", b"version https://git-lfs.github.com/spec/v1\n"),
    ]:  # fmt: skip
        (images / name).write_bytes(data)
        (images / f"{name[0]}.txt").write_text("a caption")
    (images / "k.svg").write_bytes(b"<svg/>")
    (images / "lone.txt").write_text("a caption without an image")
    (images / "a0.npz").write_bytes(b"beside an image: of no concern")
    (images / "m.png").write_bytes(png(21))
    (images / "m.txt").write_bytes("“m”".encode("cp1252"))
    os.mkfifo(images / "n.png")
    (images / "n.txt").write_text("a caption")
    (images / "link").symlink_to(tmp_path)
    prepare(images, "--out", tmp_path / "out")
    assert captions(tmp_path / "out") == [f"caption {i}" for i in range(8)] + [f"read {c}" for c in "bcde"]
    assert reasons(tmp_path / "out") == {
        "f.heic": "format not supported", "g.xyz": "unknown ending", "h": "unknown ending",
        "j.png": "Git LFS pointer in place of the file", "k.svg": "format not supported",
        "lone.txt": "caption without an image", "m.png": "caption is not UTF-8", "n.png": "cannot be read",
        "link": "link to a folder",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert sum(manifest["skipped"].values()) == 9 and manifest["skipped"]["format not supported"] == 2
    prepare(images, "--out", tmp_path / "named", "--encoding", "cp1252")
    assert "“m”" in captions(tmp_path / "named")


def test_stored_bytes_have_the_ending_of_their_format(images: Path, tmp_path: Path) -> None:
    (images / "a0.png").rename(images / "a0.jpg")
    Image.open(io.BytesIO(png(1))).save(images / "a1.png", "JPEG")
    prepare(images, "--out", tmp_path / "out")
    for name, data in members(tmp_path / "out").items():
        if not name.endswith((".txt", ".json")):
            assert {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff\xe0"}[name.rpartition(".")[2]] == data[:4]
            assert name.endswith("jpg") == name.startswith("a1")


def test_names_of_any_bytes_and_brackets(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "[a-z]*" / "{1..2}"
    folder.mkdir(parents=True)
    for name in (b"caf\xe9", b"esc\x1b[31m", b"q[1]?*", b"- =cmd()", "ü 赤".encode(), b"two\nlines"):
        path = os.fsencode(folder) + b"/" + name
        Path(os.fsdecode(path + b".png")).write_bytes(png(len(name)))
        Path(os.fsdecode(path + b".txt")).write_bytes(b"caption")
    Path(os.fsdecode(os.fsencode(folder) + b"/=bad\xff.png")).write_bytes(b"x")
    prepare(tmp_path / "[a-z]*", "--out", tmp_path / "out")
    assert len(captions(tmp_path / "out")) == 6
    stored = sources(tmp_path / "out")
    assert {
        "{1..2}/caf\\xe9.png",
        "{1..2}/esc\\x1b[31m.png",
        "{1..2}/two\\nlines.png",
        "{1..2}/ü 赤.png",
    } < stored
    assert reasons(tmp_path / "out") == {"{1..2}/=bad\\xff.png": "no caption"}
    assert not any(char in caplog.text for char in "\x1b\udcff")


def test_cells_of_the_list_are_not_formulas(images: Path, tmp_path: Path) -> None:
    (images / "=1+1.png").write_bytes(png(1))
    prepare(images, "--out", tmp_path / "out")
    assert reasons(tmp_path / "out") == {"'=1+1.png": "no caption"}


def test_line_breaks_are_joined_and_counted(images: Path, tmp_path: Path, caplog) -> None:
    (images / "a0.txt").write_text("a red\n circle\n")
    (images / "a1.txt").write_text("\n one line \n")
    prepare(images, "--out", tmp_path / "out")
    assert {"a red circle", "one line"} < set(captions(tmp_path / "out"))
    notes = json.loads((tmp_path / "out/manifest.json").read_text())["notes"]
    assert list(notes.values()) == [1] and "line breaks" in caplog.text


def test_what_the_reader_of_shards_would_refuse_is_not_written(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    from datamodules.prepare import sources as module

    (images / "a0.txt").write_text("word " * 20_000)
    monkeypatch.setattr(module, "LIMITS", (1000, *module.LIMITS[1:]))
    (images / "a1.png").write_bytes(png(1, 40, 40))
    prepare(images, "--out", tmp_path / "out")
    assert reasons(tmp_path / "out") == {"a0.png": "caption too long", "a1.png": "file too large"}


# ---- tables ---------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_several_captions_of_an_image_are_kept_together(images: Path, tmp_path: Path) -> None:
    rows = [{"file": f"a{i}.png", "caption": ["first", f"second {i}", "first", " "]} for i in range(8)]
    table = write(images / "t.jsonl", "\n".join(map(json.dumps, rows)))
    prepare(table, "--out", tmp_path / "out")
    found = members(tmp_path / "out")
    assert set(captions(tmp_path / "out")) == {"first"}
    told = sorted(json.loads(data)["captions"] for name, data in found.items() if name.endswith("json"))
    assert told == [["first", f"second {i}"] for i in range(8)]


def test_files_outside_of_the_folder_are_not_taken(images: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    names = ["a0.png", "./a0.png", "../images/a1.png", str(images / "a2.png"), "../secret.png", str(secret)]
    names += ["none.png", "http://x/y.png", "x" * 300 + ".png", "nul\\u0000.png", "half\\ud800.png", "", "."]
    lines = [f'{{"file": "{name}", "caption": "c"}}' for name in names]
    table = write(images / "t.jsonl", "\n".join(lines))
    prepare(table, "--out", tmp_path / "out")
    stored = sources(tmp_path / "out")
    assert stored == {"a0.png", "a1.png", "a2.png"}
    assert reasons(tmp_path / "out") == {
        "a0.png": "listed twice with one caption",
        "../secret.png": f"outside of {images}", str(secret): f"outside of {images}",
        "none.png": "no such file", "http://x/y.png": "no such file", "x" * 300 + ".png": "no such file",
        "nul\\x00.png": "no such file", "half\\ud800.png": "no such file", "(no file name)": "no file name",
        ".": "cannot be read",
    }  # fmt: skip
    prepare(table, "--out", tmp_path / "wide", "--images", tmp_path)
    assert set(reasons(tmp_path / "wide").values()) >= {"no such file"}
    assert "secret.png" in sources(tmp_path / "wide")


def test_a_table_that_cannot_be_trusted_stops_in_a_line(images: Path, tmp_path: Path) -> None:
    for name, text, said in [
        ("t.csv", "file,caption\na0.png,a cat, sitting\n", "t.csv, line 2: 3 fields"),
        ("t.csv", 'file,caption\na0.png,"a\na1.png,b"\n', "t.csv, line 2: a quote"),
        ("t.csv", "", "t.csv is empty"),
        ("t.jsonl", '{"file": "a0.png", "caption": NaN}', "line 1.*caption is NaN"),
        ("t.json", "{}", "t.json is not a COCO captions file"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(write(images / name, text), "--out", tmp_path / "out", "--images", images)
    os.mkfifo(images / "f.csv")
    with pytest.raises(UserError, match="is a FIFO"):
        prepare(images / "f.csv", "--out", tmp_path / "out")
    for arguments in (
        ("--encoding", "utf-9"),
        ("--max-pixels", 0),
        ("--max-aspect-ratio", "nan"),
        ("--size", 10**6),
    ):
        with pytest.raises(UserError, match="--"):
            prepare(images, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_limits_are_part_of_the_settings_when_they_are_given(images: Path, tmp_path: Path) -> None:
    (images / "a0.png").write_bytes(png(0, 90, 10))
    prepare(images, "--out", tmp_path / "out", "--max-aspect-ratio", 4)
    assert reasons(tmp_path / "out") == {"a0.png": "too elongated"}
    with pytest.raises(UserError, match="max_aspect_ratio was 4"):
        prepare(images, "--out", tmp_path / "out")


# ---- targets ----------------------------------------------------------------------------------------------------


def test_out_is_a_folder_or_nothing(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("file", "fifo", "dangling", "device", "file/below", "x" * 300):
        with pytest.raises(UserError, match="x" * 300 if name.startswith("x") else name):
            prepare(images, "--out", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "device").is_symlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    prepare(images, "--out", tmp_path / "link")
    assert (tmp_path / "folder/manifest.json").is_file()


@pytest.mark.parametrize("name", ["skipped.csv", "ATTRIBUTION.md", "train-000000.tar", "manifest.json"])
def test_what_lies_there_is_not_overwritten(images: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"name": "mine"}')
    with pytest.raises(UserError, match="give another --out"):
        prepare(images, "--out", out)
    assert [path.name for path in out.iterdir()] == [name]


def test_a_working_folder_that_is_a_link_is_not_followed(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    (tmp_path / "out/.preparing").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be locked"):
        prepare(images, "--out", tmp_path / "out")
    assert (tmp_path / "mine/file").read_text() == "mine"


def test_shards_that_another_process_has_just_published_are_kept(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    """The other one publishes between the first look and the lock: with other settings, then with the same ones."""
    from datamodules.prepare import prepare as preparing

    out, first = tmp_path / "out", preparing.working_folder

    def late(folder: Path):
        monkeypatch.setattr(preparing, "working_folder", first)
        prepare(images, "--out", out, "--shard-size", 3)
        return first(folder)

    monkeypatch.setattr(preparing, "working_folder", late)
    with pytest.raises(UserError, match="other settings"):
        prepare(images, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before) > 2
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    for path in out.iterdir():
        path.unlink()
    monkeypatch.setattr(preparing, "working_folder", late)
    assert prepare(images, "--out", out, "--shard-size", 3) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# ---- the machine ------------------------------------------------------------------------------------------------


def command(*arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.prepare", *map(str, arguments)],
        cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_a_full_disk_at_any_level_is_one_line_and_leaves_nothing(images: Path, tmp_path: Path) -> None:
    """A limit on the size of files, which fails like a full disk, from nothing to enough for the shards."""
    for i in range(8):
        (images / f"a{i}.png").write_bytes(png(i, 60, 60))
    code = (
        "import json, resource, sys; from pathlib import Path; from experiments.prepare import main\n"
        "from switti.errors import UserError; found = []\n"
        "for limit in json.loads(sys.argv[3]):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1)); out = Path(sys.argv[2], str(limit))\n"
        "    try: main([sys.argv[1], '--out', str(out), '--validation-fraction', '0', '--workers', '1']); said = ''\n"
        "    except UserError as error: said = str(error)\n"
        "    found.append([said, out.exists()])\n"
        "print(json.dumps(found))"
    )
    limits = [0, 511, 512, 1024, 5000, 10240, 20000, 40000, 65536, 90000, 150_000]
    done = subprocess.run(
        [sys.executable, "-c", code, images, tmp_path / "deep", json.dumps(limits)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcomes = json.loads(done.stdout.splitlines()[-1])
    for limit, (said, exists) in zip(limits, outcomes, strict=True):
        assert exists == (not said)
        if said:
            assert f"deep/{limit}" in said and "MiB free" in said and "make room" in said and "\n" not in said
    written = [exists for _, exists in outcomes]
    assert not written[0] and written[-1] and written == sorted(written)


def large_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    picture = Image.open(io.BytesIO(png(0, 64, 64))).resize((1500, 1500))
    picture.save(folder / "0.png")
    for i in range(count):
        (folder / f"{i}.png").write_bytes((folder / "0.png").read_bytes())
        (folder / f"{i}.txt").write_text(str(i))
    return folder


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def wait_for_children(process: subprocess.Popen, number: int) -> list[int]:
    for _ in range(400):
        found = children(process)
        if len(found) >= number:
            return found
        time.sleep(0.05)
    raise AssertionError("no workers")


@pytest.mark.slow
def test_a_killed_worker_ends_it_within_seconds_and_leaves_nothing(tmp_path: Path) -> None:
    source = large_images(tmp_path / "images", 60)
    process = command(source, "--out", tmp_path / "out", "--workers", 2)
    workers = wait_for_children(process, 2)
    time.sleep(1)
    os.kill(workers[0], signal.SIGKILL)
    began = time.perf_counter()
    _, said = process.communicate(timeout=60)
    assert time.perf_counter() - began < 10
    assert process.returncode == 2 and "memory" in said and "--workers" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_workers_end_with_their_parent_and_on_an_interrupt(tmp_path: Path) -> None:
    source = large_images(tmp_path / "images", 60)
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = command(source, "--out", tmp_path / sent.name, "--workers", 2)
        workers = wait_for_children(process, 2)
        time.sleep(1)
        process.send_signal(sent)
        process.communicate(timeout=60)
        assert process.returncode == code
        for _ in range(200):
            if not any(Path(f"/proc/{worker}").exists() for worker in workers):
                break
            time.sleep(0.05)
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not (tmp_path / "SIGINT").exists()


def test_results_keep_their_order_and_few_are_held() -> None:
    assert list(ordered_map(abs, range(-50, 50), 3)) == [abs(i) for i in range(-50, 50)]
    assert list(ordered_map(abs, [], 3)) == []
    assert next(ordered_map(abs, range(10**9), 2)) == 0


def test_workers_that_cannot_be_started_are_said(monkeypatch) -> None:
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datamodules.prepare.processes.ProcessPoolExecutor", full)
    with pytest.raises(UserError, match=r"No space left on device; --workers 1"):
        list(ordered_map(abs, [1], 2))


class Hungry:
    """An item whose image is too large for the memory."""

    key = group = kind = origin = "hungry"

    def digest_text(self) -> str:
        return "hungry"

    def build(self, size: int) -> PreparedSample:
        raise MemoryError


def test_no_memory_for_an_image_skips_that_image(tmp_path: Path) -> None:
    from datamodules.prepare.prepare import prepare as write_shards

    with pytest.raises(UserError, match="1 × not enough memory"):
        write_shards(Listing([Hungry()], {"source": "here"}), tmp_path / "out", 8, 0.1, 10, 1)


def test_reasons_are_counted_together() -> None:
    entries = [Skipped("a", "corrupt image: x"), Skipped("b", "corrupt image: y", "line 3")]
    assert {entry.reason for entry in entries} == {"corrupt image"}
    assert str(entries[1]) == "b (line 3)"
