"""Which settings may change when a run is resumed."""

from pathlib import Path

from configs.loading import PLACE, SETTINGS, from_run, shown
from configs.schema import RunConfig, get
from switti.errors import UserError

# What may change when a run is resumed: where and how fast it runs, what is watched, and the end. With another
# max_steps the rest of the schedule is another one, too.
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
    "trainer.log_every",
    "trainer.validate_every",
    "trainer.validate_batches",
)
# Whatever else is in RESUMABLE_GROUPS: the average is a result of the training, not a look at it.
FIXED = ("callbacks.ema_decay",)
RESUMABLE_GROUPS = (
    "callbacks.", "metrics.", "sampling.", "data.workers", "data.max_bad_fraction", "data.stream_",
)  # fmt: skip


def check_resumable(config: RunConfig, folder: Path, remedy: str = "another name=…") -> None:
    """Resuming with other settings would compute something else: an error that names them.

    remedy: what gives the run another folder.
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
            f"{remedy} to start anew, or remove the folder"
        )
