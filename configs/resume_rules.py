"""Settings that may change when a run is resumed, and the check of all others."""

from pathlib import Path

from configs.loading import PLACE, SETTINGS, from_run, shown
from configs.schema import RunConfig, get
from switti.errors import UserError

# Place, hardware, observation and length of a run. Another max_steps changes the rest of the schedule, too.
RESUMABLE = (
    *PLACE,
    "trainer.max_steps",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.sharding_size",
    "trainer.checkpointing",
    "trainer.compile",
    "trainer.attention",
    "trainer.cache_latents",
    "trainer.log_every",
    "trainer.validate_every",
    "trainer.validate_batches",
    "trainer.loggers",
    "trainer.profiler",
    "trainer.fast_dev_run",
    "trainer.limit_train_batches",
)
# Exceptions from RESUMABLE_GROUPS. The EMA is a result of training, not an observation of it. A history of the
# objective is of one batch at equal intervals, or of one score; what decides on it may change, as max_steps may: it is
# applied to all that was evaluated before, too.
FIXED = (
    "callbacks.ema_decay",
    "callbacks.objective_dynamics.every",
    "callbacks.objective_dynamics.batch",
    "callbacks.objective_dynamics.score",
)
RESUMABLE_GROUPS = (
    "callbacks.", "metrics.", "sampling.", "data.workers", "data.max_bad_fraction", "data.stream_",
)  # fmt: skip


def check_resumable(config: RunConfig, folder: Path, remedy: str = "another name=…") -> None:
    """UserError if a run folder was started with other settings that affect its result, naming them.

    remedy: the setting that gives the run another folder.
    """
    before = from_run(folder)
    changed = [
        f"{name}={shown(config, name)} (the run has {shown(before, name)})"
        for name in SETTINGS
        if (name in FIXED or not (name in RESUMABLE or name.startswith(RESUMABLE_GROUPS)))
        and get(config, name) != get(before, name)
        and shown(config, name) != shown(before, name)
    ]
    if changed:
        raise UserError(
            f"{folder} was started with other settings: {'; '.join(changed)}. Give the old ones to resume it, "
            f"{remedy} to start a new run, or remove the folder"
        )
