"""python -m experiments.board STUDY [--port 6006] [--host localhost]

TensorBoard over a study's runs, with what the bare curves lack, written into runs/<study>/board/: a layout of charts
that belong together (CUSTOM SCALARS: losses by scale, norms by block, metrics) and a table of what was varied against
what came out (HPARAMS, renewed while it is open). Sample pictures are under IMAGES.

    python -m experiments.board demo
    python -m experiments.board demo --port 6007 --host 0.0.0.0      # to be reached from other machines

Needs neither torch nor a network. Ctrl-C ends it.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from experiments.board_layout import Board
from experiments.command import run
from switti.errors import UserError
from switti.studies import find_study, run_folders

_RENEW_SECONDS = 30.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.board",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="a name below runs/, or a folder of run folders")
    parser.add_argument("--port", type=int, default=6006, help="(default %(default)s)")
    parser.add_argument("--host", default="localhost", help="(default %(default)s)")
    options = parser.parse_args(arguments)
    folder = find_study(options.study)
    if not list(run_folders(folder)):
        raise UserError(f"no run in {folder} has started; there is nothing to show yet")
    board = Board(folder)
    board.renew()
    print(f"TensorBoard over {folder}: http://{options.host}:{options.port}/  (Ctrl-C ends it)", flush=True)
    return _serve(board, folder, options.host, options.port)


def _serve(board: Board, folder: Path, host: str, port: int) -> int:
    command = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", host, "--port", str(port),
        "--reload_interval", "5", "--reload_multifile", "true",
    ]  # fmt: skip
    signal.signal(signal.SIGTERM, _interrupt)  # the server must not outlive this process
    server = subprocess.Popen(command)
    try:
        while True:
            try:
                code = server.wait(timeout=_RENEW_SECONDS)
                break
            except subprocess.TimeoutExpired:
                board.renew()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return 0
    finally:
        if server.poll() is None:
            server.terminate()
        board.close()
    if code:
        raise UserError(f"TensorBoard could not serve {host}:{port} (see above); another --port may be free")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run(main)
