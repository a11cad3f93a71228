"""python -m experiments.status STUDY [--once] [--every SECONDS]

The runs of a study with their state, step, speed, time left, last losses and metrics, and last sign of life, read from
the run folders alone. On a terminal the table is shown again every few seconds until Ctrl-C; elsewhere, or with --once,
it is printed once, 80 columns wide unless COLUMNS says otherwise. What does not fit is named below it.

    python -m experiments.status demo
    python -m experiments.status runs/demo --once
"""

import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from experiments.cli import argument_parser, run
from sweeps.run_state import find_study
from sweeps.status_table import screen
from switti.errors import UserError


def main(arguments: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("study", help="a name below runs/, or a folder of run folders")
    parser.add_argument("--once", action="store_true", help="print it once, also on a terminal")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="(default %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 < options.every < float("inf"):
        raise UserError(f"--every {options.every:g} must be positive")
    folder = find_study(options.study)
    console = Console(highlight=False)
    if options.once or not console.is_terminal:
        console.print(screen(folder, console.width))
        return 0
    _live(folder, console, options.every)
    return 0


def _live(folder: Path, console: Console, every: float) -> None:
    """Drawn again and again until Ctrl-C, which is the way to leave and no error."""
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            foot = Text(f"\n{time.strftime('%H:%M:%S')}  Ctrl-C leaves", style="dim")
            live.update(Group(screen(folder, console.width), foot), refresh=True)
            time.sleep(every)


if __name__ == "__main__":
    run(main)
