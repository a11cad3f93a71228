"""What `experiments.board` writes beside the runs: TensorBoard's chart layout and HParams table. No command itself."""

import re
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from configs.loading import PLACE, SETTINGS, from_run, shown
from configs.schema import RunConfig
from experiments.progress import average_speed, read_rows
from switti.errors import UserError
from switti.run_folder import CONFIG, read_record
from switti.studies import read_study, run_folders, state_of

FOLDER = "board"  # below the study's
_FINAL = re.compile(r"(train|validation)/loss|metrics/.+|norms/last/max")  # the table's metrics
_STATUS = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}


class Board:
    """The study's extra event files; older ones of this command are replaced."""

    def __init__(self, study: Path) -> None:
        self.study, self.folder = study, study / FOLDER
        if (self.folder / CONFIG).is_file():
            raise UserError(f"{self.folder} is a run; rename it, TensorBoard's extra files are kept there")
        for path in self.folder.rglob("events.out.tfevents.*"):
            path.unlink()
        self._writers: dict[str, EventFileWriter] = {}
        self._written: dict[str, Any] = {}
        self._layout = b""

    def renew(self) -> None:
        """Write what has changed since the last call."""
        configs = {}
        for path in run_folders(self.study):
            if (path / CONFIG).is_file():
                configs[path.name] = from_run(path)
        finals = {name: final_values(self.study / name) for name in configs}
        layout = chart_layout(
            list(configs.values()), {metric for values in finals.values() for metric in values}
        )
        if (content := layout.SerializeToString()) != self._layout:
            self._layout = content
            self._add("", layout_summary(content), 0)
        for name, varied in varied_settings(configs, read_study(self.study)).items():
            self._write_session(name, varied, finals[name])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _write_session(self, name: str, varied: dict[str, Any], values: dict[str, float]) -> None:
        """One row of the HParams table: what was varied, and the newest values."""
        state = state_of(self.study / name)
        step = (read_record(self.study / name) or {}).get("step", 0)
        if (now := (varied, values, state)) == self._written.get(name):
            return
        if self._written.get(name, (None,))[0] != varied:
            self._add(name, hparams_pb(varied, trial_id=name), 0)
        self._written[name] = now
        for metric, value in values.items():
            # Under another name, or the charts would show each run's last point as a run of its own.
            self._add(name, Summary(value=[Summary.Value(tag=f"final/{metric}", simple_value=value)]), step)
        if state in _STATUS:
            self._add(name, session_end(state), step)

    def _add(self, name: str, summary: Summary, step: int) -> None:
        if name not in self._writers:
            self._writers[name] = EventFileWriter(str(self.folder / name))
        self._writers[name].add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writers[name].flush()


def final_values(run_dir: Path) -> dict[str, float]:
    """Metric → newest value, of those that the table shows; with the speed of the whole training."""
    values = {row.metric: row.value for row in read_rows(run_dir) if _FINAL.fullmatch(row.metric)}
    speed = average_speed(read_record(run_dir) or {})
    return values | ({"time/steps_per_second": speed} if speed else {})


def varied_settings(configs: dict[str, RunConfig], study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run → the settings that the study varies or in which the runs differ, as what TensorBoard can show."""
    space = (study.get("search") or {}).get("space", {})
    planned = {
        *(study.get("vary") or {}),
        *space,
        *(name for point in (study.get("points") or {}).values() for name in point),
    }
    names = [
        name
        for name in SETTINGS
        if name not in PLACE
        and (name in planned or len({str(shown(config, name)) for config in configs.values()}) > 1)
    ]
    return {
        run: {name: _shown(shown(config, name)) for name in names or ["seed"]}
        for run, config in configs.items()
    }


def _shown(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def chart_layout(configs: list[RunConfig], metrics: set[str]) -> Layout:
    """Charts that are read together; tags are regular expressions, each run is a line."""
    sides = max((config.tokenizer.scales for config in configs), key=len, default=[])
    depth = max((config.model.depth for config in configs if config.task == "generator"), default=0)
    online = sorted(name for name in metrics if name.startswith("metrics/"))
    categories = [
        _category("Loss", {"validation": "validation/loss", "training": "train/loss"}),
        _category("Loss by scale", _by_scale("validation/loss_by_scale", sides)),
        _category("Accuracy by scale", _by_scale("validation/accuracy_by_scale", sides), closed=True),
        _category("Loss by scale in training", _by_scale("train/loss_by_scale", sides), closed=True),
        _category(
            "Norms by block",
            {
                "largest, all blocks": r"norms/(block_\d+|last)/max",
                "mean, all blocks": r"norms/(block_\d+|last)/mean",
                **{f"block {i}": f"norms/block_{i}/max" for i in range(depth)},
                "last": "norms/last/max",
            },
        ),
        _category("Metrics", {name.removeprefix("metrics/"): re.escape(name) for name in online}),
        _category(
            "Time and memory",
            {
                "seconds a step": "time/step_seconds",
                "samples a second": "time/samples_per_second",
                "GiB": "memory/peak_gib",
            },
            closed=True,
        ),
    ]
    return Layout(category=[category for category in categories if category.chart])


def _by_scale(stem: str, sides: list[int]) -> dict[str, str]:
    single = {f"scale {k}, {side}×{side}": f"{stem}/{k}" for k, side in enumerate(sides)}
    return {"all scales": rf"{stem}/\d+", **single}


def _category(title: str, charts: dict[str, str], closed: bool = False) -> Category:
    content = [
        Chart(title=name, multiline=MultilineChartContent(tag=[f"^{tag}$"])) for name, tag in charts.items()
    ]
    return Category(title=title, chart=content, closed=closed)


def layout_summary(content: bytes) -> Summary:
    """A serialised Layout as the custom-scalar plugin reads it."""
    return Summary(
        value=[
            Summary.Value(
                tag=layout_metadata.CONFIG_SUMMARY_TAG,
                tensor=TensorProto(dtype=DT_STRING, string_val=[content]),
                metadata=layout_metadata.create_summary_metadata(),
            )
        ]
    )


def session_end(state: str) -> Summary:
    """How a run ended, as the HParams plugin reads it."""
    end = plugin_data_pb2.SessionEndInfo(status=_STATUS[state], end_time_secs=time.time())
    metadata = hparams_metadata.create_summary_metadata(
        plugin_data_pb2.HParamsPluginData(session_end_info=end)
    )
    value = Summary.Value(
        tag=hparams_metadata.SESSION_END_INFO_TAG, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR
    )
    return Summary(value=[value])
