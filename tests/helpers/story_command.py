"""How the stories run a command: as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def command(root: Path, *arguments: object, code: int = 0) -> str:
    """Runs python -m experiments.… and returns what it printed; fails with its output if the exit code differs."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr
