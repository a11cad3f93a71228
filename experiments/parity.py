"""python -m experiments.parity DIR [--verbose]

Compares this implementation with golden tensors of the published one. DIR is a folder of safetensors files with a
meta.json that holds every setting. Prints the worst deviation of each quantity beside its tolerance; token indices
must be equal. Exit code 1 if any quantity is out.
"""

import argparse
import json
import math
from pathlib import Path

from experiments.command import run
from switti.errors import UserError


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="experiments.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with meta.json and safetensors files")
    parser.add_argument("--verbose", action="store_true", help="one line for every tensor")
    return parser.parse_args(argv)


def _group(quantity: str) -> str:
    """`sampling.swiglu_ar/greedy_off/logits.2` → `sampling.swiglu_ar logits`; `vae.fhat_tok.1` → `vae.fhat_tok`."""
    import re

    if quantity.startswith("sampling."):
        variant, _, name = quantity.split("/", 2)
        return f"{variant} {re.sub(r'[.][0-9]+$', '', name)}"
    for kind in ("grad_l2", "grad_cols0", "grad", "final_param_l2", "final", "step"):
        if f".{kind}" in quantity:
            return quantity[: quantity.index(f".{kind}") + len(kind) + 1]
    return re.sub(r"\.\d+(?=\.|$)", "", quantity)


def main(argv: list[str]) -> int:
    arguments = _arguments(argv)
    meta_path = arguments.folder / "meta.json"
    if not meta_path.is_file():
        raise UserError(f"{arguments.folder} holds no meta.json; give a folder of golden tensors")
    meta = json.loads(meta_path.read_text())

    from switti.parity.functions import check_functions
    from switti.parity.sampling import check_sampling
    from switti.parity.trajectory import check_trajectory
    from switti.parity.transformer import check_transformers
    from switti.parity.vae import check_vae

    parts = {
        "vae": check_vae,
        "switti": check_transformers,
        "functions": check_functions,
        "trajectory": check_trajectory,
        "sampling": check_sampling,
    }
    checks = []
    for part, check in parts.items():
        if part in meta:
            checks += check(arguments.folder, meta)
    worst: dict[str, list] = {}
    for check in checks:
        worst.setdefault(check.quantity if arguments.verbose else _group(check.quantity), []).append(check)
    width = max(len(name) for name in worst)
    print(f"{'quantity':{width}}  {'worst':>10}  {'tolerance':>10}  tensors")
    for name, group in worst.items():
        bad = max(group, key=lambda c: (not c.passed, math.inf if math.isnan(c.deviation) else c.deviation))
        tolerance = "equal" if bad.exact else f"{bad.tolerance:.1e}"
        mark = "" if all(c.passed for c in group) else "  FAILED"
        print(f"{name:{width}}  {bad.deviation:10.2e}  {tolerance:>10}  {len(group):7d}{mark}")
    failed = [check for check in checks if not check.passed]
    for check in failed:
        print(f"failed: {check.quantity}: {check.deviation:.3e} > {check.tolerance:.1e}")
    print(f"{len(checks) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
