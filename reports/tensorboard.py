"""Layout of a study in TensorBoard: order and groups of charts, HPARAMS table."""

import re
import time
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from configs.loading import PLACE, SETTINGS, shown
from configs.schema import RunConfig
from reports.data.metric_catalogue import split_of

_ORDER = {"metrics": 2, "validation": 3, "train": 4, "norms": 5, "time": 6, "memory": 7, "data": 8}
_TABLE = (
    "validation/loss",
    "validation/[^/]+/loss",
    "validation/psnr",
    "train/loss",
    "metrics/.+",
    "norms/last/max",
    "time/samples_per_second",
)
_EARLY = re.compile(r"objective_dynamics/(\w+)")
_STATUS = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}


def chart_name(metric: str) -> str:
    """The chart of a metric: its name in metrics.csv behind a number for the order, and all losses side by side.

    TensorBoard sorts groups by name and opens the first two.
    """
    group, _, rest = metric.partition("/")
    if rest == "loss" and group in ("train", "validation"):
        return f"1 loss/{group}"
    if rest == f"{(split := split_of(metric))}/loss":
        return f"1 loss/{group} {split}"
    return f"{_ORDER.get(group, len(_ORDER) + 2)} {metric}"


def table_metrics(metrics: set[str]) -> list[str]:
    """Those that the table shows, in its order; TensorBoard ticks the first ones."""
    return [name for pattern in _TABLE for name in sorted(metrics) if re.fullmatch(pattern, name)]


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
        _category(
            "Early stopping",
            {name.partition("/")[2]: re.escape(name) for name in sorted(metrics) if _EARLY.fullmatch(name)},
        ),
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
        Chart(title=name, multiline=MultilineChartContent(tag=[f"^{chart_name(tag)}$"]))
        for name, tag in charts.items()
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


def experiment_summary(varied: list[dict[str, Any]], metrics: list[str]) -> Summary:
    """The columns of the HPARAMS table: the settings of the runs, then these metrics in this order."""
    shown_metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=chart_name(metric)), display_name=metric)
        for metric in metrics
    ]
    names = dict.fromkeys(name for settings in varied for name in settings)
    settings = [
        _setting_info(name, [settings[name] for settings in varied if name in settings]) for name in names
    ]
    experiment = api_pb2.Experiment(hparam_infos=settings, metric_infos=shown_metrics)
    return _hparams_summary(hparams_metadata.EXPERIMENT_TAG, experiment=experiment)


def _setting_info(name: str, values: list[Any]) -> api_pb2.HParamInfo:
    info = api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_STRING)
    if all(isinstance(value, bool) for value in values):
        info.type = api_pb2.DATA_TYPE_BOOL
    elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        info.type = api_pb2.DATA_TYPE_FLOAT64
        return info
    info.domain_discrete.extend(dict.fromkeys(values))
    return info


def session_end(state: str) -> Summary | None:
    """How a run ended, as the HParams plugin reads it; None for one that has not ended."""
    if state not in _STATUS:
        return None
    end = plugin_data_pb2.SessionEndInfo(status=_STATUS[state], end_time_secs=time.time())
    return _hparams_summary(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _hparams_summary(tag: str, **content: Any) -> Summary:
    metadata = hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)])
