"""Facts for a model card out of a run folder: data and their licence, training, metrics with conventions, samples."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from reports.data.metric_catalogue import describe
from reports.data.runs import Evaluation, Run, read_run
from switti.durations import duration
from switti.errors import UserError
from switti.files import kind_of, read_bytes
from switti.run_folder import RECORD, SAMPLES
from switti.sampling.model_card import ATTRIBUTION, MetricValue, RunFacts

_MAX_IMAGE, _MAX_TEXT = 64 << 20, 1 << 20
_TRAINING = (
    "seed", "data.batch_size", "optimizer.learning_rate", "callbacks.ema_decay", "trainer.precision",
    "trainer.strategy", "init_from", "tokenizer_weights",
)  # fmt: skip


def read_facts(folder: Path, step: int, ema: bool) -> RunFacts:
    """Facts of a run whose checkpoint of `step` is exported; without a record its name, steps and samples alone.

    ema: whether the exported weights are the EMA.
    """
    exported = {"optimizer steps": step, "exported weights": "EMA" if ema else "trained"}
    if kind_of(folder / RECORD) is None:
        return RunFacts(name=folder.name, training=exported, samples=_samples(folder, step))
    run = read_run(folder)
    evaluation = run.evaluation
    return RunFacts(
        name=run.name,
        training=exported | _training(run),
        data=_data(run),
        metrics=() if evaluation is None else tuple(_metrics(evaluation)),
        evaluated="" if evaluation is None else _evaluated(evaluation),
        samples=_samples(folder, step),
        attribution=_attribution(run),
    )


def _training(run: Run) -> dict[str, Any]:
    record = run.record
    facts = {name: run.config[name] for name in _TRAINING if run.config.get(name) is not None}
    if (seconds := record.get("train_seconds")) is not None:
        facts["training time"] = duration(seconds)
    facts |= {
        name: record[name] for name in ("device", "world_size", "commit") if record.get(name) is not None
    }
    if isinstance(versions := record.get("versions"), dict):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return facts


def _data(run: Run) -> dict[str, Any]:
    facts = {split: run.config.get(f"data.{split}") for split in ("train", "validation")}
    facts |= {f"{split}, digest": run.contents(split) for split in ("train", "validation")}
    return {name: value for name, value in facts.items() if value is not None}


def _evaluated(evaluation: Evaluation) -> str:
    step = "" if evaluation.step is None else f" at step {evaluation.step}"
    count = "" if evaluation.images is None else f" on {evaluation.images} images"
    split = "" if evaluation.captions is None else f" of the {evaluation.captions} captions"
    settings = ", ".join(
        f"{name}={value}" for name, value in evaluation.settings.items() if value is not None
    )
    return f"Measured{step}{count}{split}{f' with {settings}' if settings else ''}."


def _metrics(evaluation: Evaluation) -> Iterator[MetricValue]:
    for name, value in evaluation.metrics.items():
        metric = describe(f"evaluation/{name}")
        yield MetricValue(metric.heading, value, metric.description)


def _samples(folder: Path, step: int) -> Image.Image | None:
    """The guided grid of that step, or of the last one before it."""
    latest = f"step_{step:06d}_guided.png"
    grids = [path for path in (folder / SAMPLES).glob("step_*_guided.png") if path.name <= latest]
    if not grids:
        return None
    path = max(grids)
    try:
        with Image.open(io.BytesIO(read_bytes(path, _MAX_IMAGE)), formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image; remove it or restore it") from error


def _attribution(run: Run) -> str:
    """Of the folders that hold the training shards."""
    train = run.config.get("data.train")
    patterns = [train] if isinstance(train, str) else train if isinstance(train, list) else []
    texts: dict[str, None] = {}
    for pattern in patterns:
        path = Path(str(pattern)).parent / ATTRIBUTION
        if "\0" in str(pattern) or kind_of(path) is None:
            continue
        try:
            texts[read_bytes(path, _MAX_TEXT).decode("utf-8")] = None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text; remove it or restore it") from error
    return "\n".join(texts)
