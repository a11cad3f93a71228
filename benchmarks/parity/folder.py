"""Comparison of a folder of golden tensors or numbers, part by part, by the kind of folder that it is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.parity.common import Golden
from benchmarks.parity.functions import check_functions
from benchmarks.parity.icd_attention import check_attention
from benchmarks.parity.icd_functions import check_functions as check_icd_functions
from benchmarks.parity.icd_functions import check_schedule
from benchmarks.parity.icd_tiny import check_tiny_losses, check_training, check_trajectories
from benchmarks.parity.icd_unet import check_editing, check_unet
from benchmarks.parity.objective_dynamics import check_cases, check_clip, check_other_criteria
from benchmarks.parity.sampling import check_sampling
from benchmarks.parity.trajectory import check_trajectory
from benchmarks.parity.transformer import check_transformers
from benchmarks.parity.vae import check_vae

Parts = dict[str, Callable[[Golden], None]]

# Parts by the key at the top of the settings that each one is about.
SCALE_WISE: Parts = {
    "vae": check_vae,
    "switti": check_transformers,
    "functions": check_functions,
    "trajectory": check_trajectory,
    "sampling": check_sampling,
}
OBJECTIVE_DYNAMICS: Parts = {
    "cases": check_cases,
    "clip": check_clip,
    "other_criteria": check_other_criteria,
}
INVERTIBLE: Parts = {
    "solver_configs": check_schedule,
    "wt_cases": check_icd_functions,
    "loss_cases": check_tiny_losses,
    "training": check_training,
    "trajectories": check_trajectories,
    "controllers": check_attention,
    "unet": check_unet,
    "editing": check_editing,
}
KINDS = (SCALE_WISE, OBJECTIVE_DYNAMICS, INVERTIBLE)


def compare(folder: str | Path, meta: Mapping[str, Any] | None = None) -> Golden:
    """Everything that the folder holds. meta: instead of its meta.json.

    Raises UserError for a folder without settings. Missing, corrupt and misshapen entries are in the result.
    """
    golden = Golden.open(folder, meta)
    for name, check in _parts_of(golden).items():
        if name in golden.meta:
            with golden.part(name):
                check(golden)
        else:
            golden.leave_out(golden.meta.file, name)
    return golden


def _parts_of(golden: Golden) -> Parts:
    """The kind that has most of its parts in the folder."""
    return max(KINDS, key=lambda parts: sum(name in golden.meta for name in parts))
