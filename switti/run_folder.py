"""The contract of the run folder: its files' names and formats; records and metrics read, checked and written.

    runs/<study>/<run>/
        config.yaml                  all settings, as given on the last start
        record.json                  what ran where, how far it got, how it ended
        metrics.csv                  every logged number: step, epoch, metric, value, time (Unix seconds)
        events.out.tfevents.*        the same numbers for TensorBoard
        profile/                     what trainer.profiler measured
        checkpoints/                 step_000500.ckpt …; last.ckpt and best.ckpt are links
        samples/                     grids of sampled images; samples/latest/ with index.json for the report
        damaged.csv                  samples that could not be read
        heartbeat/rank_<r>.json      where each rank stands; heartbeat/hung when nothing moves any more
        evaluation.json              what experiments.evaluate measured
        queued.json prune.json preempted.json    waits in a queue; was pruned by a search; was preempted
        output.log                   what the run printed, when a sweep started it

Everything here may have been written by others, truncated or corrupted: what is read is checked, and a UserError names
the file, what is wrong, and what to do. State: `sweeps.run_state`; locks: `sweeps.run_lock`.
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from switti.errors import UserError
from switti.files import atomic_write, check_target, open_regular, read_bytes, read_json, write_json, writing

# Of the folder as a whole; noted in record.json and in the heartbeat's files.
FORMAT = 1

CONFIG = "config.yaml"
RECORD = "record.json"
METRICS = "metrics.csv"
EVALUATION = "evaluation.json"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
LATEST_SAMPLES = f"{SAMPLES}/latest"
SAMPLES_INDEX = "index.json"
DAMAGED = "damaged.csv"
HEARTBEAT = "heartbeat"
HUNG = "hung"
QUEUED = "queued.json"
PRUNE = "prune.json"
PREEMPTED = "preempted.json"
LOG = "output.log"
# In the study's folder, beside its runs.
STUDY = "study.json"

Status = Literal["running", "finished", "failed", "interrupted"]

LONGEST_NAME = 200
_NAME = re.compile(r"\w[\w.,=+@-]*")

# Temporary names of files that training alone writes (see switti.files).
_LEFTOVER = re.compile(
    r"\.(config\.yaml|record\.json|metrics\.csv|damaged\.csv|preempted\.json|rank_\d+\.json|index\.json|"
    r"[\w]+\.png|\w+\.safetensors)(\.[0-9a-f]{12})?\.tmp"
)
_MAX_INTEGER = 2**63 - 1
_MAX_PID = 2**31 - 1
_MAX_RECORD_BYTES = 4 << 20
_REMEDY = "restore the file or remove it"
_ABSENT = object()
_MAX_METRICS_BYTES = 2 << 30
# Names of metrics in one run: a chart each. A billion-parameter run with norms of all blocks has about 300.
MAX_METRICS = 1000
_LONGEST_METRIC = 200


# ---- names --------------------------------------------------------------------------------------------------------


def check_name(name: str, what: str = "name") -> str:
    """`name`, if a run or study may have it. Raises UserError naming `what`.

    Letters, digits and . _ - , = + @, not beginning with a dot or a dash, at most 200 bytes: it is a folder, a label in
    charts and pages, and an argument of commands.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what}={name[:60]!r} is not a usable folder name: give letters, digits and . _ - , = + @, "
            "beginning with a letter, a digit or _"
        )
    if (length := len(name.encode())) > LONGEST_NAME:
        raise UserError(f"{what}={name[:60]}… has {length} bytes; at most {LONGEST_NAME} make a folder name")
    return name


def rank_file(rank: int | str) -> str:
    """Name of a rank's file in the heartbeat folder; of all for `*`."""
    return f"rank_{rank}.json"


def check_present(run_dir: str | Path) -> None:
    """UserError if the run folder is gone: whoever writes into it must not bring a part of it back."""
    if not Path(run_dir).is_dir():
        raise UserError(f"{run_dir} has been removed or renamed; nothing more is written for this run")


def clear_leftovers(run_dir: str | Path) -> None:
    """Remove temporary files that a killed training left behind. For the holder of the run's lock."""
    folder = Path(run_dir)
    for place in (folder, folder / HEARTBEAT, folder / SAMPLES, folder / LATEST_SAMPLES):
        for path in place.glob(".*.tmp"):
            if _LEFTOVER.fullmatch(path.name):
                with writing(path):
                    path.unlink(missing_ok=True)


# ---- record.json --------------------------------------------------------------------------------------------------


def read_record(run_dir: str | Path) -> dict[str, Any] | None:
    """The run's record, checked: format, status and the kind of everything that is computed with. None: no record.

    Raises UserError for a record of another format or one that is not what a run writes.
    """
    path = Path(run_dir) / RECORD
    record = read_json(path, default=_ABSENT, limit=_MAX_RECORD_BYTES)
    if record is _ABSENT:
        return None
    if not isinstance(record, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(record).__name__}; {_REMEDY}")
    if type(actual := record.get("format")) is not int or actual != FORMAT:
        raise UserError(
            f"{path} has format {str(actual)[:60]}; this version reads format {FORMAT} only: "
            "use the version that made it, or name the runs without it"
        )
    for key, (kind, words) in _FIELDS.items():
        if key in record and not kind(record[key]):
            raise UserError(f"{path}: {key} must be {words}, not {str(record[key])[:60]!r}; {_REMEDY}")
    if "status" not in record:
        raise UserError(f"{path} lacks its status; {_REMEDY}")
    return record


def write_record(run_dir: str | Path, record: Mapping[str, Any]) -> None:
    """Replace the run's record. Raises UserError where it cannot be written, or if the folder is gone."""
    check_present(run_dir)
    write_json(Path(run_dir) / RECORD, record, parents=False)


def _is_integer(value: Any, low: int = 0, high: int = _MAX_INTEGER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_moment(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        moment(value)
    except (ValueError, OverflowError):
        return False
    return True


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_integer, value.values()))


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(split, dict) and _is_text(split.get("digest")) for split in value.values()
    )


def _is_early_stop(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("reason"), str) and _is_integer(value.get("step"))


_INTEGER = (_is_integer, "a whole number of at least 0")
_TEXT = (_is_text, "text or null")
_MOMENT = (_is_moment, "a time such as 2025-03-01T12:00:00+00:00")
_FIELDS: dict[str, tuple[Any, str]] = {
    "status": (lambda value: value in get_args(Status), f"one of {', '.join(get_args(Status))}"),
    **dict.fromkeys(("name", "study", "task", "error", "command", "commit", "device", "host"), _TEXT),
    **dict.fromkeys(("seed", "step", "world_size", "tokens_per_image", "peak_memory_bytes"), _INTEGER),
    "max_steps": (lambda value: _is_integer(value, -1), "a whole number"),
    "pid": (lambda value: _is_integer(value, 1, _MAX_PID), "a process's number"),
    "train_seconds": (_is_number, "a number of at least 0"),
    "started": _MOMENT,
    "updated": _MOMENT,
    "ended": (lambda value: value is None or _is_moment(value), "a time or null"),
    "resumed": (lambda value: isinstance(value, list) and all(map(_is_integer, value)), "a list of steps"),
    "parameters": (_is_counts, "an object of whole numbers"),
    "versions": (
        lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
        "an object of texts",
    ),
    "early_stop": (_is_early_stop, "an object with a reason and a step"),
    "data": (_is_data, "an object of splits with their digests"),
}


def moment(text: str) -> datetime:
    """An ISO time as in record.json; one without a zone is UTC. Raises ValueError."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def seconds_since(text: str) -> float:
    """Seconds from an ISO time to now."""
    return (datetime.now(UTC) - moment(text)).total_seconds()


# ---- metrics.csv --------------------------------------------------------------------------------------------------

COLUMNS = ("step", "epoch", "metric", "value", "time")


class Row(NamedTuple):
    """One logged number. step: optimizer steps completed. time: Unix seconds."""

    step: int
    epoch: int
    metric: str
    value: float
    time: float


def read_metrics(run_dir: str | Path, last_bytes: int | None = None) -> list[Row]:
    """The rows of a run's metrics.csv in the order in which they were written; [] if there is no such file.

    A truncated last line is skipped: it may just be being written. last_bytes: of the end of the file alone.
    Raises UserError that names the file and line for anything that a run does not write.
    """
    path = Path(run_dir) / METRICS
    try:
        content, first = _read_end(path, last_bytes)
    except FileNotFoundError:
        return []
    complete = content[: content.rfind(b"\n") + 1]
    if not complete:
        return []
    try:
        lines = complete.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        position = complete.count(b"\n", 0, error.start) + 1
        place = f"line {position}" if first else "near its end"
        raise UserError(f"{path} is not text in UTF-8 ({place}); {_REMEDY}") from None
    head = first and lines[0].removesuffix("\r") == ",".join(COLUMNS)
    rows: list[Row] = []
    names: set[str] = set()
    for number, line in enumerate(lines[head:], 1 + head):
        try:
            row = _parse(line)
            if row.metric not in names:
                check_metric(row.metric, len(names))
                names.add(row.metric)
        except (ValueError, UserError) as error:
            raise _damaged(path, number if first else None, str(error)) from None
        rows.append(row)
    return rows


def _read_end(path: Path, last_bytes: int | None) -> tuple[bytes, bool]:
    """(the file, or its last lines; whether the first line is among them)."""
    if last_bytes is None or path.stat().st_size <= last_bytes:
        return read_bytes(path, _MAX_METRICS_BYTES), True
    with open_regular(path) as stream:
        stream.seek(-last_bytes, io.SEEK_END)
        return stream.read().partition(b"\n")[2], False


def _damaged(path: Path, line: int | None, reason: str) -> UserError:
    place = f"{path}, line {line}" if line else f"{path}, near its end"
    return UserError(f"{place}: {reason}; correct or remove the line, or move the file away")


def _parse(line: str) -> Row:
    """Raises ValueError with the reason."""
    line = line.removesuffix("\r")
    fields = line.split(",") if '"' not in line else _split_quoted(line)
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} fields instead of {len(COLUMNS)}")
    step, epoch, metric, value, time = fields
    if not (step.isascii() and step.isdigit() and len(step) < 20 and int(step) <= _MAX_INTEGER):
        raise ValueError(f"step {step[:60]!r} is not a whole number below 2**63")
    try:
        return Row(int(step), int(epoch), metric, float(value), float(time))
    except ValueError:
        raise ValueError("epoch, value or time is not a number") from None


def _split_quoted(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration) as error:
        raise ValueError(f"not CSV ({error})") from None


def append_metrics(run_dir: str | Path, rows: Sequence[Row]) -> None:
    """Add rows at the end of metrics.csv and hand them to the system. Raises UserError where that is impossible."""
    path = Path(run_dir) / METRICS
    check_present(run_dir)
    check_target(path)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows((row.step, row.epoch, row.metric, repr(row.value), f"{row.time:.3f}") for row in rows)
    with writing(path), path.open("a", encoding="utf-8", newline="") as stream:
        if stream.tell() == 0:
            stream.write(",".join(COLUMNS) + "\n")
        stream.write(text.getvalue())


def rewind_metrics(run_dir: str | Path, step: int) -> None:
    """Drop the rows after `step`, which a resumed run writes again, and a truncated last line. The rest stays."""
    rows = iter(read_metrics(run_dir))
    path = Path(run_dir) / METRICS
    if not path.is_file():
        return
    content = read_bytes(path, _MAX_METRICS_BYTES)
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
    head = ",".join(COLUMNS).encode()
    kept = b"".join(
        line + b"\n" for line in lines if line.removesuffix(b"\r") == head or next(rows).step <= step
    )
    if kept != content:
        with atomic_write(path) as temporary:
            temporary.write_bytes(kept)


def metric_values(run_dir: str | Path, metric: str) -> dict[int, float]:
    """Step → value of one metric; a later value of a step replaces the earlier one."""
    return {row.step: row.value for row in read_metrics(run_dir) if row.metric == metric}


def check_metric(name: str, others: int) -> None:
    """UserError if no chart or table can show a metric of this name, or if a run with `others` more has too many."""
    if not 0 < len(name) <= _LONGEST_METRIC or not name.isprintable():
        raise UserError(
            f"{name[:60]!r} is not a metric's name: give 1 to {_LONGEST_METRIC} printable characters"
        )
    if others >= MAX_METRICS:
        raise UserError(f"more than {MAX_METRICS} different metrics in one run")
