"""Files that are read by position, never through a memory map: what shrinks while it is read is an error, no signal."""

import errno
import os
from collections import OrderedDict
from pathlib import Path

from switti.files import open_regular

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class CutOffError(OSError):
    """A file ends before its known contents, or has been replaced."""


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error says nothing about the file: the process has no descriptor or no memory left."""
    return isinstance(error, OSError) and error.errno in (*_NO_DESCRIPTOR, errno.ENOMEM)


class OpenFiles:
    """Reads of many files through a few descriptors. One a process: it opens lazily and is not sent open."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._handles: OrderedDict[Path, int] = OrderedDict()
        self._process = os.getpid()

    def read(self, path: Path, size: int, offset: int, expected: int | None = None) -> bytes:
        """`size` bytes from `offset` on. expected: size that the file had, in bytes; it is compared on opening.

        Raises:
            OSError: FileNotFoundError if the file is gone, CutOffError if it is shorter or another one, or any other.
            UserError: it is not a regular file.
        """
        try:
            data = os.pread(self._handle(path, expected), size, offset)
        except CutOffError:
            raise
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                raise
            # A network drive that was away for a moment wants its files to be opened again.
            self._forget(path)
            data = os.pread(self._handle(path, expected), size, offset)
        if len(data) < size:
            self._forget(path)
            raise CutOffError(f"{path} is shorter than it was")
        return data

    def _forget(self, path: Path) -> None:
        handle = self._handles.pop(path, None)
        if handle is not None:
            os.close(handle)

    def _handle(self, path: Path, expected: int | None) -> int:
        if self._process != os.getpid():  # a forked worker: its parent's descriptors are not its own to close
            self._handles, self._process = OrderedDict(), os.getpid()
        if path in self._handles:
            self._handles.move_to_end(path)
            return self._handles[path]
        while len(self._handles) >= self.most:
            os.close(self._handles.popitem(last=False)[1])
        handle = self._open(path)
        if expected is not None and os.fstat(handle).st_size != expected:
            os.close(handle)
            raise CutOffError(f"{path} has another size than when it was checked")
        self._handles[path] = handle
        return handle

    def _open(self, path: Path) -> int:
        try:
            with open_regular(path) as stream:
                return os.dup(stream.fileno())
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR or not self._handles:
                raise
        # The limit of the process is below ours: use what it allows.
        self.most = max(1, len(self._handles) // 2)
        self.close()
        return self._open(path)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __getstate__(self) -> dict[str, int]:
        return {"most": self.most}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]
