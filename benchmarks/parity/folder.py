"""Comparison of a folder of golden tensors, part by part."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.parity.common import META, Golden
from benchmarks.parity.functions import check_functions
from benchmarks.parity.sampling import check_sampling
from benchmarks.parity.trajectory import check_trajectory
from benchmarks.parity.transformer import check_transformers
from benchmarks.parity.vae import check_vae

PARTS: dict[str, Callable[[Golden], None]] = {
    "vae": check_vae,
    "switti": check_transformers,
    "functions": check_functions,
    "trajectory": check_trajectory,
    "sampling": check_sampling,
}


def compare(folder: str | Path, meta: Mapping[str, Any] | None = None) -> Golden:
    """Everything that the folder holds. meta: instead of its meta.json.

    Raises UserError for a folder without meta.json. Missing, corrupt and misshapen entries are in the result.
    """
    golden = Golden.open(folder, meta)
    for name, check in PARTS.items():
        if name in golden.meta:
            with golden.part(name):
                check(golden)
        else:
            golden.leave_out(META, name)
    return golden
