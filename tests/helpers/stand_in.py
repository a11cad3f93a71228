"""Runs that train nothing, for tests of what starts, watches and stops runs."""

import json
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Behaves as experiments.train does towards a driver: saves its config, then its record and metrics.
# `trained` in the run folder counts starts. Files in the working folder change what happens:
#   fail       seed 1 fails
#   slow       each of the five steps takes so many seconds; SIGINT and SIGTERM interrupt
#   die        is killed at once
#   preempt    ends with code 75 after two steps more than the last time
STAND_IN = """
import json, math, os, signal, socket, sys, time
from datetime import UTC, datetime
from pathlib import Path
from configs.loading import load, to_yaml

config = load(sys.argv[1], sys.argv[2:])
folder = config.run_dir
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(to_yaml(config))
with open(folder / "trained", "a") as stream:
    stream.write("x")
rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
(folder / f"rank_{rank}_of_{world}").touch()
step = json.loads((folder / "record.json").read_text())["step"] if (folder / "record.json").is_file() else 0

def record(status, error=None):
    temporary = folder / f".record.{rank}"
    temporary.write_text(json.dumps({
        "format": 1, "status": status, "error": error, "pid": os.getpid(), "host": socket.gethostname(), "step": step,
        "max_steps": config.trainer.max_steps, "train_seconds": 2.0, "updated": datetime.now(UTC).isoformat()}))
    temporary.replace(folder / "record.json")

def leave(number, frame):
    record("interrupted")
    sys.exit(130 if number == signal.SIGINT else 75)

record("running")
signal.signal(signal.SIGINT, leave)
signal.signal(signal.SIGTERM, leave)
slow = float(Path("slow").read_text() or 12) if Path("slow").exists() else 0
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
print("training", config.name, "threads", os.environ.get("OMP_NUM_THREADS"), "cores", cores, flush=True)
if config.seed == 1 and Path("fail").exists():
    record("failed", "ValueError: loss is not finite")
    print("Traceback\\nValueError: loss is not finite", file=sys.stderr)
    sys.exit(1)
if Path("die").exists():
    os.kill(os.getpid(), signal.SIGKILL)
first = step
while step < 5:
    step += 1
    value = abs(math.log10(config.optimizer.learning_rate) + 3) + 1 / step
    if rank == 0:
        with open(folder / "metrics.csv", "a") as stream:
            stream.write(f"{step},0,validation/loss,{value!r},{time.time()}\\n")
    if Path("preempt").exists() and step == first + 2:
        record("interrupted")
        sys.exit(75)
    end = time.monotonic() + slow
    while time.monotonic() < end:
        time.sleep(0.02)
        if config.callbacks.prunable and (folder / "prune.json").is_file():
            leave(signal.SIGTERM, None)
record("finished")
"""
BASE = (
    "tokenizer: {scales: [1, 2, 4], multipliers: [1, 2], codebook_size: 64, code_width: 8, channels: 32}\n"
    "model: {depth: 2, width: 64, heads: 4}\n"
    "data: {train: train.tar, validation: train.tar}\n"
    "tokenizer_weights: tokenizer.safetensors\n"
)


def prepare(folder: Path) -> None:
    """The stand-in, a base config and what it names in `folder`, which is to be the working folder."""
    save_file({"quantize.embedding.weight": np.zeros((64, 8), np.float32)}, folder / "tokenizer.safetensors")
    with tarfile.open(folder / "train.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "base.yaml").write_text(BASE)


def starts(run: str) -> int:
    """How often a run (its path below runs/) was started."""
    path = Path("runs") / run / "trained"
    return len(path.read_text()) if path.exists() else 0


def record_of(run: str) -> dict:
    """Its record.json."""
    return json.loads((Path("runs") / run / "record.json").read_text())


def driver(arguments: list[str]) -> str:
    """Code that is `python -m experiments.sweep …` with the stand-in for the train command."""
    return (
        "import sys; from experiments import sweep; from experiments.cli import run\n"
        "from sweeps.launchers import local as launch_local\n"
        "launch_local.TRAIN = ['stand_in.py']\n"
        f"sys.argv = {['sweep', *arguments]!r}\n"
        "run(sweep.main)"
    )
