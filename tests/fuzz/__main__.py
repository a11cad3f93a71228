"""python tests/fuzz [--seconds 600] [--count N] [--seed 0] [--only TARGET …] [--replay FOLDER]

Mutates everything that the product reads (images, shards, captions, tables, embeddings, indices, exported folders,
checkpoints, run folders, settings) and looks at what it makes of it. The right answers are: a UserError of one line,
damage that is counted, or data as their manifest says. Exit code 1 after a traceback, a hang, a crash, executed code
or a silent acceptance; such inputs are kept, and `--replay` reads one of them again.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "helpers")]

from fuzz_campaign import describe, run_campaign  # noqa: E402
from fuzz_targets import TARGETS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="when to stop (%(default)s)")
    parser.add_argument("--count", type=int, help="mutations after which to stop (none)")
    parser.add_argument("--seed", type=int, default=0, help="another one, other mutations (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(TARGETS), metavar="TARGET", help=", ".join(sorted(TARGETS))
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds until a case hangs (%(default)s)"
    )
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail (%(default)s)"
    )
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="a folder in KEEP")
    options = parser.parse_args()
    if options.replay is not None:
        return replay(options.replay)
    names = options.only or list(TARGETS)
    summary = run_campaign(
        names, options.seed, options.keep.absolute(), options.seconds, options.count, options.workers,
        options.patience, progress=sys.stderr.isatty(),
    )  # fmt: skip
    print("\n".join(describe(summary)))
    return 1 if summary.failures else 0


def replay(folder: Path) -> int:
    """Read one kept input again in this process, with its traceback."""
    import json
    import tempfile

    failure = json.loads((folder / "failure.json").read_text())
    target = TARGETS[failure["target"]]()
    with tempfile.TemporaryDirectory() as home:
        target.build(Path(home))
        try:
            target.read(folder.absolute() / "input")
            print("accepted")
        except target.refusals as error:
            print(f"refused: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
