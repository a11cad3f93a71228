"""Real runs on small disks that are full at every level: a line, an exit code, a state; with more room they resume."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from story_command import command
from story_images import draw_pictures

pytestmark = pytest.mark.slow

# One process imports torch once and forks for each attempt: argv[1] is the disk, then the command line with FREE for …
ATTEMPTS = """
import json, os, sys
from pathlib import Path
from experiments.cli import run
from experiments import train
import configs.build
from sweeps.run_state import state_of

disk, log = Path(sys.argv[1]), Path(sys.argv[2])
run_dir = disk / "runs" / "single" / "x"
sys.argv = ["train", *sys.argv[3:]]

def attempt():
    if (pid := os.fork()) == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 99
        try:
            run(train.main)
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"code": code, "output": log.read_text(errors="replace"), "state": state_of(run_dir)}

for line in sys.stdin:
    free = int(line)
    with open(disk / "ballast", "wb") as stream:
        stat = os.statvfs(disk)
        stream.write(bytes(stat.f_bavail * stat.f_frsize - free))
    first = attempt()
    (disk / "ballast").unlink()
    print(json.dumps([first, attempt()]), flush=True)
    os.system(f"rm -rf {disk}/runs")
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB in memory, for which one must be root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def settings(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("full")
    draw_pictures(base / "pictures")
    split = ("--size", 16, "--validation-fraction", 0.3)
    command(root, "experiments.prepare", base / "pictures", "--out", base / "data", *split)
    command(root, "experiments.embed", base / "data")
    data = [f"data.train={base}/data/train-*.tar", f"data.validation={base}/data/validation-*.tar"]
    command(
        root, "experiments.train", "tokenizer/tiny", "trainer.max_steps=1", *data, f"runs_dir={base}/runs"
    )
    return [
        *data, f"tokenizer_weights={base}/runs/single/tiny/tokenizer.safetensors",
        f"data.embeddings={base}/data/embeddings", "trainer.max_steps=6", "trainer.log_every=1",
        "trainer.validate_every=2", "callbacks.checkpoint_every=2", "callbacks.samples_every=2",
        "callbacks.metrics_every=0", "callbacks.best_metric=validation/loss", "name=x",
    ]  # fmt: skip


def test_every_level_ends_in_a_line_and_resumes(
    root: Path, disk: Path, settings: list[str], tmp_path: Path
) -> None:
    levels = [*range(0, 120, 8), *range(120, 4000, 350), 20_000]
    arguments = ["generator/tiny", *settings, f"runs_dir={disk}/runs"]
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(disk), str(tmp_path / "log"), *arguments],
        cwd=root, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        input="\n".join(str(level * 1024) for level in levels), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(attempts) == len(levels)
    failed = set()
    for level, (full, roomy) in zip(levels, attempts, strict=True):
        said = full["output"].replace("\r", "\n").splitlines()
        assert "Traceback" not in full["output"], (level, full["output"])
        if full["code"]:
            assert full["code"] == 2, (level, said)
            assert said[-1].startswith("error: cannot write ") and "free); make room and " in said[-1], (
                level,
                said,
            )
            assert full["state"] in ("failed", "killed", "new"), (level, full["state"])
            failed.add(said[-1].split()[4 if "checkpoint" in said[-1] else 3].rstrip(":").rpartition("/")[2])
        assert (roomy["code"], roomy["state"]) == (0, "finished"), (level, roomy["output"])
    # Something of every kind, on the way from nothing to enough.
    assert {"metrics.csv", "record.json", "step_000002.ckpt"} < failed and len(failed) >= 5, failed
    assert attempts[-1][0]["code"] == 0
