"""python -m experiments.board STUDY [--port 6006] [--host localhost]

Start TensorBoard for a study's runs, one color per run: losses first (TIME SERIES), grouped charts (CUSTOM SCALARS:
losses by scale, norms by block, metrics), a table of the varied settings and the results (HPARAMS), and sample images
(IMAGES). It shows metrics.csv and samples/, with the steps of the report, and follows runs in progress.

    python -m experiments.board demo
    python -m experiments.board demo --port 6007 --host 0.0.0.0      # reachable from other machines

Nothing is written into the run folders. It needs neither torch nor a network. Ctrl-C stops it.
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from experiments.cli import argument_parser, run
from reports.board_mirror import Board
from sweeps.run_state import find_study, run_folders
from switti.errors import UserError

_RENEW_SECONDS = 10.0
# Largest share of the time that is spent on reading changes.
_LARGEST_SHARE = 0.05


def main(arguments: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("study", help="a name below runs/, or a folder of run folders")
    parser.add_argument("--port", type=int, default=6006, help="(default %(default)s)")
    parser.add_argument("--host", default="localhost", help="(default %(default)s)")
    options = parser.parse_args(arguments)
    folder = find_study(options.study)
    if not list(run_folders(folder)):
        raise UserError(f"no run in {folder} has started; there is nothing to show yet")
    # Neither the server nor its files must outlive this process.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix=f"board_{folder.resolve().name}_") as mirror:
            return _serve(Board(folder, Path(mirror)), options.host, options.port)
    except KeyboardInterrupt:
        return 0


def _serve(board: Board, host: str, port: int) -> int:
    wait = _renew(board)
    print(f"TensorBoard over {board.study}: http://{host}:{port}/  (Ctrl-C stops it)", flush=True)
    command = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(board.folder), "--host", host, "--port", str(port),
        "--reload_interval", "5",
    ]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        while True:
            try:
                code = server.wait(timeout=wait)
                break
            except subprocess.TimeoutExpired:
                wait = _renew(board)
    finally:
        server.terminate()
        server.wait()
    if code:
        raise UserError(f"TensorBoard could not serve {host}:{port} (see above); another --port may be free")
    return 0


def _renew(board: Board) -> float:
    """Update the mirror; returns the seconds until the next update."""
    begun = time.monotonic()
    board.renew()
    return max(_RENEW_SECONDS, (time.monotonic() - begun) / _LARGEST_SHARE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run(main)
