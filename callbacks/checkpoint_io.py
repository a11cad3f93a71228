"""Atomic checkpoint writer: to a temporary name, synced, then renamed; in the background if the caller waits later."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from switti.distributed.sharded_checkpoint import (
    holds_shards,
    is_sharded,
    publish,
    read_unsharded,
    reason,
    remove,
    snapshot,
    write_sharded,
)
from switti.errors import UserError
from switti.files import free_space, sync_file, temporary_beside
from switti.weights.describe import check_run
from switti.weights.read import weights_in
from switti.weights.torch_files import read_torch


class AtomicCheckpointIO(CheckpointIO):
    """One file for unsharded weights, written by rank zero; a folder written by all ranks for sharded ones
    (`switti.distributed.sharded_checkpoint`).

    A full disk, an error or a kill at any moment leaves the previous checkpoint valid. UserErrors of writing give path
    and free space. `save_checkpoint` returns when the checkpoint is complete; within `in_background` it returns as soon
    as the state has been copied, and the caller polls `busy` or waits, checks `failure`, and calls `publish`.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self._deferring = False
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._group: Any = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes local files and takes no storage_options")
        self.wait()
        self._path, self.failure = Path(path), None
        write = self._writer(snapshot(checkpoint) if self._deferring else checkpoint, self._path)
        if self._deferring:
            # A daemon: where another rank has died, the exchange of a sharded write would never end.
            self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self._thread.start()
            return
        write()
        if self.failure:
            raise UserError(self.failure)
        self.publish()

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Within, `save_checkpoint` starts to write and returns."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def busy(self) -> bool:
        """Whether this rank is writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Block until this rank has written, or failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def publish(self) -> None:
        """Rename what all ranks have written without failure. All ranks call it; rank zero renames."""
        if self._path is not None and (self._group is None or dist.get_rank() == 0):
            publish(self._path)
        if self._group is not None:
            dist.barrier(self._group)
        self._path = None

    def _writer(self, checkpoint: Mapping[str, Any], path: Path) -> Callable[[], None]:
        """The write as a function that notes a failure. Sharded writes use a process group of their own."""
        work, sharded = temporary_beside(path), holds_shards(checkpoint)
        if sharded and self._group is None:
            self._group = dist.new_group(backend="gloo")

        def write() -> None:
            try:
                if sharded:
                    write_sharded(checkpoint, work, self._group)
                else:
                    write_file(checkpoint, work)
            except Exception as error:
                # In a thread, where nobody else would see it.
                self.failure = (
                    f"cannot write checkpoint {path}: {reason(error)} ({free_space(path.parent)} free); "
                    "make room and start the run again, it resumes from the previous checkpoint"
                )

        return write

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Of either kind; a sharded one is consolidated."""
        checkpoint = read_unsharded(Path(path)) if is_sharded(path) else read_torch(Path(path))
        weights_in(checkpoint, Path(path))
        check_run(checkpoint, Path(path))
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def write_file(checkpoint: Mapping[str, Any], work: Path) -> None:
    """torch.save to `work`, synced; removed after a failure."""
    # But not the run folder: a removed one stays removed.
    work.parent.mkdir(exist_ok=True)
    try:
        with work.open("wb") as stream:
            torch.save(checkpoint, stream)
        sync_file(work)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
