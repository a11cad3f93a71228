"""python -m experiments.parity DIR [--verbose]

Compares this implementation with golden tensors of the published one. DIR is a folder of safetensors files with a
meta.json that holds every setting, or one of numbers alone with a golden.json; what it is about follows from what it
holds: the scale-wise transformer and its tokenizer, invertible consistency distillation, or early stopping. Prints the
worst deviation of each quantity beside its tolerance; token indices and stopping points must be equal. A folder may
lack quantities: they are named and counted, and all others are checked.

Exit code 1 if any quantity is out of tolerance or cannot be computed, 2 if nothing could be checked.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli import argument_parser, run
from switti.errors import UserError
from switti.tables import aligned

if TYPE_CHECKING:
    from benchmarks.parity.common import Check, Golden


def _group(quantity: str) -> str:
    """`sampling.swiglu_ar/greedy_off/logits.2` → `sampling.swiglu_ar logits`; `vae.fhat_tok.1` → `vae.fhat_tok`."""
    if quantity.startswith("sampling.") and quantity.count("/") >= 2:
        variant, _, name = quantity.split("/", 2)
        return f"{variant} {re.sub(r'[.][0-9]+$', '', name)}"
    if quantity.startswith("icd."):
        *path, last = quantity.split("/") if "/" in quantity else (quantity, "")
        path += ["grad"] if last == "grad_norm" else []
        return "/".join(path[:3] if path[2:3] == ["grad"] else path[:2])
    for kind in ("final_param_l2", "final", "step", "grad_l2", "grad_cols0", "grad"):
        if f".{kind}" in quantity:
            return quantity[: quantity.index(f".{kind}") + len(kind) + 1]
    return re.sub(r"\.\d+(?=\.|$)", "", quantity)


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "folder", type=Path, help="folder with meta.json and safetensors files, or with golden.json"
    )
    parser.add_argument("--verbose", action="store_true", help="one line for every tensor or number")
    options = parser.parse_args(argv)

    from benchmarks.parity.folder import compare

    golden = compare(options.folder)
    if golden.checks:
        _print_table(golden.checks, options.verbose)
    _print_gaps(golden)
    for check in golden.failed:
        reason = check.reason or f"{check.deviation:.3e} > {check.tolerance:.1e}"
        print(f"failed: {check.quantity}: {reason}")
    absent = sum(max(1, len(keys)) for keys in golden.absent.values())
    passed = len(golden.checks) - len(golden.failed)
    print(f"{passed} passed, {len(golden.failed)} failed, {absent} absent")
    if not golden.checks:
        raise UserError(f"{options.folder}: nothing could be checked; it lacks what every comparison needs")
    return 1 if golden.failed else 0


def _print_table(checks: "list[Check]", verbose: bool) -> None:
    worst: dict[str, list[Check]] = {}
    for check in checks:
        worst.setdefault(check.quantity if verbose else _group(check.quantity), []).append(check)
    rows = [("quantity", "worst", "tolerance", "count")]
    marks = [""]
    for name, group in worst.items():
        bad = max(group, key=lambda c: (not c.passed, math.inf if math.isnan(c.deviation) else c.deviation))
        tolerance = "equal" if bad.exact else f"{bad.tolerance:.1e}"
        rows.append((name, f"{bad.deviation:.2e}", tolerance, str(len(group))))
        marks.append("" if all(c.passed for c in group) else "  FAILED")
    for line, mark in zip(aligned(rows), marks, strict=True):
        print(f"{line}{mark}")


def _print_gaps(golden: "Golden") -> None:
    """What the folder lacks, what was therefore not compared, and what this version does not know."""
    for file, keys in golden.absent.items():
        print(f"absent from {file}: {len(keys)}: {', '.join(keys)}" if keys else f"absent: {file}")
    for reason in golden.blocked:
        print(f"not checked: {reason}")
    for file, keys in golden.unknown.items():
        print(f"not compared in {file}: {len(keys)}: {', '.join(keys)}")
    if golden.unread:
        print(f"not read: {', '.join(golden.unread)}")


if __name__ == "__main__":
    run(main)
