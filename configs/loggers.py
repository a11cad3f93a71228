"""Loggers by `trainer.loggers`: TensorBoard, metrics.csv, Weights & Biases, MLflow, and the user's own."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from callbacks.csv_logger import MetricsCSV
from callbacks.event_log import EventLog
from configs.loading import to_dict
from configs.schema import RunConfig
from lightning_modules.config import LOGGERS
from lightning_modules.strategies.launch_environment import is_first_rank
from switti.errors import UserError
from switti.import_path import build_object, load_factory

PROJECT = "switti"
_WANDB_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(\w+)")


def check_loggers(names: list[str]) -> None:
    """UserError if one of them is not installed, or is not a Logger."""
    for name in names:
        if name not in LOGGERS:
            load_factory("trainer.loggers", name, Logger)
        elif name in ("wandb", "mlflow") and find_spec(name) is None:
            raise UserError(
                f"trainer.loggers={name} needs a package that is not installed: pip install -e '.[{name}]'"
            )


def build_loggers(config: RunConfig) -> list[Logger]:
    """In the order in which they are named; metrics.csv last if it is not."""
    names = config.trainer.loggers
    check_loggers(names)
    return [_build(config, name) for name in (names if "csv" in names else [*names, "csv"])]


def _build(config: RunConfig, name: str) -> Logger:
    folder = config.run_dir
    if name == "tensorboard":
        return EventLog(folder)
    if name == "csv":
        return MetricsCSV(folder)
    if name == "wandb":
        return _wandb(config)
    if name == "mlflow":
        return _mlflow(config)
    logger: Logger = build_object("trainer.loggers", name, Logger, config)
    return logger


def _wandb(config: RunConfig) -> WandbLogger:
    """A resumed run continues its run of Weights & Biases, if its files are still in the run folder."""
    return WandbLogger(
        name=config.name,
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=config.study,
        save_dir=config.run_dir,
        id=_last_wandb_id(config.run_dir),
        config=to_dict(config),
    )


def _last_wandb_id(folder: Path) -> str | None:
    runs = [match for path in folder.glob("wandb/*run-*") if (match := _WANDB_FOLDER.fullmatch(path.name))]
    return max(runs, key=lambda match: match[1])[2] if runs else None


def _mlflow(config: RunConfig) -> MLFlowLogger:
    """Each start of a run is a run of MLflow, on the server that MLFLOW_TRACKING_URI names, or in the run folder."""
    logger = MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=config.name,
        tags={"study": config.study or "single"},
        save_dir=str(config.run_dir / "mlruns"),
    )
    if is_first_rank() and not config.trainer.fast_dev_run:
        logger.log_hyperparams(to_dict(config))
    return logger
