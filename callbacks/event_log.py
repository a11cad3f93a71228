"""TensorBoard logger; a failure to write the event file ends the run like that of any other of its files."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from callbacks.csv_logger import CompletedSteps
from switti.errors import UserError
from switti.files import write_failure


class EventLog(CompletedSteps, TensorBoardLogger):
    """Lightning's logger with steps as in metrics.csv, and without the chart of epochs.

    A thread of TensorBoard's writes the file; when it fails, the next call raises UserError.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(str(run_dir), name="", version="")
        _report_once()

    @property
    def path(self) -> Path:
        """The file's name in messages; the actual one has the time and the host in it."""
        return Path(self.log_dir) / "events.out.tfevents"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # Lightning wraps whatever a writer raises in a ValueError.
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, UserError):
                raise cause from error
            if not isinstance(cause, OSError):
                raise
            raise UserError(write_failure(self.path, cause.strerror or str(cause), cause.errno)) from error

    @property
    def experiment(self) -> Any:
        """Opened at the first use."""
        with self._writing():
            return super().experiment

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Tell TensorBoard to forget what is after `step`. Files stay as they are."""
        restart = SessionLog(status=SessionLog.START)
        with self._writing():
            self.experiment.file_writer.add_event(Event(step=step + 1, session_log=restart), step=step + 1)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        with self._writing():
            super().log_metrics(values, self.completed(step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """No-op: the run folder's config.yaml holds them, and experiments.board shows them."""

    @rank_zero_only
    def log_image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """An RGB image of bytes."""
        with self._writing():
            self.experiment.add_image(name, image_HWC, step, dataformats="HWC")

    @rank_zero_only
    def save(self) -> None:
        with self._writing():
            self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file. If the run has failed, its own error is the one to report."""
        if self._experiment is None:
            return
        try:
            with self._writing():
                self._experiment.flush()
                self._experiment.close()
        except UserError:
            with suppress(OSError):
                self._experiment.close()
            if status == "success":
                raise


class _WithoutTensorBoard:
    """A hook for uncaught errors of threads that passes on all but the write errors of TensorBoard's."""

    def __init__(self, inner: Callable[[threading.ExceptHookArgs], Any]) -> None:
        self._inner = inner

    def __call__(self, arguments: threading.ExceptHookArgs) -> None:
        theirs = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (theirs and issubclass(arguments.exc_type, OSError)):
            self._inner(arguments)


def _report_once() -> None:
    """Keep the traceback of TensorBoard's thread off the screen: its error is raised again where the run logs."""
    if not isinstance(threading.excepthook, _WithoutTensorBoard):
        threading.excepthook = _WithoutTensorBoard(threading.excepthook)
