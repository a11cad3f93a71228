"""Detection of the launcher (torchrun, srun), and a check of its world size against the settings. Imports no torch."""

import os
from collections.abc import Mapping

from lightning_modules.config import TrainerConfig
from switti.errors import UserError


def find_launcher(environment: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """(torchrun or srun, number of processes that it has started), or None for a process started without one."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun", int(environment["WORLD_SIZE"])
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "batch").isdigit():
        return "srun", int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    return None


def check_launch(config: TrainerConfig, environment: Mapping[str, str] = os.environ) -> None:
    """UserError if torchrun or srun has started another number of processes than the settings say.

    A single process with several devices on one node is fine: it starts the others itself.
    """
    wanted = config.world_size
    launcher = find_launcher(environment)
    if launcher is not None and launcher[1] != wanted:
        raise UserError(
            f"{launcher[0]} has started {launcher[1]} processes, but trainer.devices={config.devices} × "
            f"trainer.num_nodes={config.num_nodes} = {wanted}; make them agree"
        )
    by_srun = launcher is not None and launcher[0] == "srun"
    if by_srun and wanted > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise UserError(f"give sbatch and srun --ntasks-per-node={config.devices} instead of --ntasks")
    if launcher is None and config.num_nodes > 1 and "NODE_RANK" not in environment:
        raise UserError(
            f"trainer.num_nodes={config.num_nodes} needs a launcher on every node: torchrun or srun"
        )


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is, or will be, rank zero, by the launcher's variables that Lightning reads."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if name in environment:
            return environment[name] == "0"
    return True
