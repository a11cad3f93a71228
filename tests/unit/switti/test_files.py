"""Files: atomic and unique writes, regular files only, JSON within limits."""

import errno
import os
import threading
from pathlib import Path

import pytest

from switti.errors import UserError
from switti.files import (
    atomic_write,
    check_regular,
    check_target,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    write_json,
    writing,
)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def special_files(tmp_path: Path, fifo: Path) -> list[Path]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    return [fifo, tmp_path / "folder", tmp_path / "link", Path("/dev/null")]


def test_what_is_not_a_regular_file_is_neither_read_nor_replaced(tmp_path: Path, fifo: Path) -> None:
    for path in special_files(tmp_path, fifo):
        before = os.lstat(path)
        for action in (open_regular, check_regular, read_json, check_target, lambda p: write_json(p, {})):
            with pytest.raises(UserError, match=rf"{path} is a .*, not a regular file"):
                action(path)
        assert os.lstat(path).st_mode == before.st_mode


def test_a_link_to_a_regular_file_is_read_but_not_replaced(tmp_path: Path) -> None:
    write_json(tmp_path / "real", {"a": 1})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_json(tmp_path / "link") == {"a": 1}
    with pytest.raises(UserError, match="symbolic link"):
        write_json(tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink()


def test_two_writers_at_once_leave_one_file_of_one_of_them(tmp_path: Path) -> None:
    target, barrier = tmp_path / "out", threading.Barrier(8)

    def write(number: int) -> None:
        with atomic_write(target) as temporary:
            temporary.write_text(str(number) * 10_000)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = target.read_text()
    assert len(text) == 10_000 and len(set(text)) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_write_keeps_the_old_file_and_names_path_space_and_remedy(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    message = rf"cannot write {target}: No space left.*MiB free\); make room"
    with pytest.raises(UserError, match=message), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "out.json", {})


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path: Path) -> None:
    write_json(tmp_path / ("x" * 250), 1)
    with pytest.raises(UserError, match="File name too long"):
        write_json(tmp_path / ("x" * 300), 1)


def test_other_errors_within_writing_pass() -> None:
    with pytest.raises(ConnectionError), writing("x"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 70 + "]" * 70,
        '{"a":' * 500 + "1" + "}" * 500,
        "1" * 5000,
        "{",
        "\udcff".encode("utf8", "surrogatepass"),
    ],
)
def test_json_beyond_the_limits_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_within_the_limits(tmp_path: Path) -> None:
    assert parse_json("[" * 64 + "]" * 64)
    (tmp_path / "x").write_text("[1, 2]")
    assert read_json(tmp_path / "x") == [1, 2]
    assert read_json(tmp_path / "missing", default=3) == 3
    assert read_json_object(tmp_path / "missing") == {}
    with pytest.raises(UserError, match="holds a list, not a JSON object"):
        read_json_object(tmp_path / "x")
    with pytest.raises(UserError, match="larger than"):
        read_bytes(tmp_path / "x", limit=5)
