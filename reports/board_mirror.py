"""Event files for `experiments.board`: one TensorBoard run for each run folder, written from its metrics and samples.

metrics.csv becomes charts, in groups that TensorBoard, which sorts by name, shows in a sensible order; so the steps are
those of the report, for runs of any age.
"""

import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from configs.loading import from_run
from configs.schema import RunConfig
from reports.tensorboard import (
    chart_layout,
    chart_name,
    experiment_summary,
    layout_summary,
    session_end,
    table_metrics,
    varied_settings,
)
from sweeps.run_state import State, read_study, run_folders, state_of
from switti.errors import UserError
from switti.files import read_bytes
from switti.run_folder import CONFIG, METRICS, SAMPLES, Row, read_metrics

# Of a curve, which is as many as TensorBoard keeps.
POINTS = 1000
# Of each kind of sample grid, likewise.
GRIDS = 10
_MAX_GRID_BYTES = 64 << 20


class Board:
    """All runs of a study below `folder`, which is empty at first."""

    def __init__(self, study: Path, folder: Path) -> None:
        self.study, self.folder = study, folder
        self._runs: dict[str, MirroredRun] = {}
        self._reported: set[str] = set()
        self._layout = b""
        self._has_table = False

    def renew(self) -> None:
        """Write what has changed since the last call.

        A run that cannot be read is named once and skipped; UserError if there is no other.
        """
        problems: list[str] = []
        configs: dict[str, RunConfig] = {}
        states: dict[str, State] = {}
        for path in run_folders(self.study):
            try:
                if (path / CONFIG).is_file():
                    config, states[path.name] = from_run(path), state_of(path)
                    run = self._runs.setdefault(path.name, MirroredRun(path, self.folder / path.name))
                    run.renew()
                    configs[path.name] = config
            except UserError as error:
                problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        if not configs:
            raise UserError(problems[0] if problems else f"no run in {self.study} has started")
        self._report(problems)
        varied = varied_settings(configs, read_study(self.study))
        for name, settings in varied.items():
            self._runs[name].describe(settings, states[name])
        self._describe_all(configs, states, list(varied.values()))

    def _describe_all(
        self, configs: dict[str, RunConfig], states: dict[str, State], varied: list[dict[str, Any]]
    ) -> None:
        """What is about all runs, in the first one: a run of its own would be one more colour."""
        first = self._runs[next(iter(configs))]
        metrics = {metric for name in configs for metric in self._runs[name].metrics}
        content = chart_layout(list(configs.values()), metrics).SerializeToString()
        if content != self._layout:
            self._layout = content
            first.write([Event(summary=layout_summary(content))])
        shown = table_metrics(metrics)
        # TensorBoard takes the first description that it reads: it must not come before what it describes.
        waiting = "running" in states.values() and not _is_complete(shown, configs)
        if shown and not self._has_table and not waiting:
            self._has_table = True
            first.write([Event(summary=experiment_summary(varied, shown))])

    def _report(self, problems: list[str]) -> None:
        for problem in problems:
            if problem not in self._reported:
                self._reported.add(problem)
                print(f"skipped: {problem}", file=sys.stderr, flush=True)


def _is_complete(metrics: list[str], configs: dict[str, RunConfig]) -> bool:
    """Whether everything that these runs will have in the table is there."""
    online = any(config.callbacks.metrics_every for config in configs.values() if config.task == "generator")
    return "validation/loss" in metrics and (
        not online or any(name.startswith("metrics/") for name in metrics)
    )


class MirroredRun:
    """One run folder, and the event file made from it.

    metrics: names of all that it has logged.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.run = run
        self.file = folder / "events.out.tfevents.board"
        self.metrics: set[str] = set()
        self._changed = 0
        self._count = 0
        self._last: Row | None = None
        self._grids: set[tuple[str, int]] = set()
        self._varied: dict[str, Any] | None = None
        self._ended: State | None = None

    def write(self, events: list[Event]) -> None:
        """Add events; those without a time are from now."""
        new = not self.file.exists()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as stream:
            records = RecordWriter(stream)
            header = [Event(file_version="brain.Event:2")] if new else []
            for event in header + events:
                event.wall_time = event.wall_time or time.time()
                records.write(event.SerializeToString())

    def describe(self, varied: dict[str, Any], state: State) -> None:
        """The run's line in the HPARAMS table."""
        if varied != self._varied:
            self._varied = varied
            self.write([Event(summary=hparams_pb(varied, trial_id=self.run.name))])
        if (end := session_end(state)) and state != self._ended:
            self._ended = state
            self.write([Event(summary=end)])

    def renew(self) -> None:
        """Write what the run has logged since the last call; all of it again if it was resumed from before that."""
        path = self.run / METRICS
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        if changed != self._changed:
            rows = read_metrics(self.run)
            if self._count and (len(rows) < self._count or rows[self._count - 1] != self._last):
                self._count = 0
                self.write([Event(step=1, session_log=SessionLog(status=SessionLog.START))])
            new, self._changed = rows[self._count :], changed
            self.metrics |= {row.metric for row in new}
            self.write([_scalar(row) for row in thinned(new)])
            self._count, self._last = len(rows), rows[-1] if rows else None
        self._renew_grids()

    def _renew_grids(self) -> None:
        for kind in ("guided", "unguided"):
            for path in sorted((self.run / SAMPLES).glob(f"step_*_{kind}.png"))[-GRIDS:]:
                key = path.name, path.stat().st_mtime_ns
                if key not in self._grids and (event := _grid(path, kind)):
                    self._grids.add(key)
                    self.write([event])


def thinned(rows: list[Row]) -> list[Row]:
    """At most about POINTS rows a metric, evenly, the last one among them."""
    total: dict[str, int] = {}
    for row in rows:
        total[row.metric] = total.get(row.metric, 0) + 1
    seen = dict.fromkeys(total, 0)
    kept = []
    for row in rows:
        seen[row.metric] += 1
        every = -(-total[row.metric] // POINTS)
        if (total[row.metric] - seen[row.metric]) % every == 0:
            kept.append(row)
    return kept


def _scalar(row: Row) -> Event:
    value = Summary.Value(tag=chart_name(row.metric), simple_value=row.value)
    return Event(wall_time=row.time, step=row.step, summary=Summary(value=[value]))


def _grid(path: Path, kind: str) -> Event | None:
    """A sample grid as it is; None while it is being written, or if it is corrupt."""
    try:
        content, step = read_bytes(path, _MAX_GRID_BYTES), int(path.name.split("_")[1])
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
    except (OSError, UserError, ValueError):
        return None
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    value = Summary.Value(tag=f"samples/{kind}", image=image)
    return Event(wall_time=path.stat().st_mtime, step=step, summary=Summary(value=[value]))
