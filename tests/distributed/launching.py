"""How tests start several ranks: torchrun on this machine, one agent a simulated node, everything ended in time."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
CASES = Path(__file__).parent / "rank_cases.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(program: list[str], ranks: int, nodes: int = 1, device: str = "cpu") -> list[subprocess.Popen[str]]:
    """`nodes` agents of torchrun with `ranks` processes each; `program` as behind torchrun's own options.

    device: the ranks see no GPU on "cpu".
    """
    paths = os.pathsep.join([PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--nnodes={nodes}",
                f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}", *program,
            ],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )
        for node in range(nodes)
    ]  # fmt: skip


def finish(agents: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """(exit code, output) of each agent; all of their processes are ended after so many seconds."""
    outcomes = []
    try:
        for agent in agents:
            output, _ = agent.communicate(timeout=seconds)
            outcomes.append((agent.returncode, output))
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.communicate()
    return outcomes


def run_cases(
    cases: list[dict[str, Any]],
    out: Path,
    ranks: int,
    nodes: int = 1,
    seconds: float = 600,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """What rank zero wrote of each case. `devices`, `num_nodes` and `accelerator` follow from the arguments."""
    out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        case["trainer"] = {**case.get("trainer", {}), "devices": ranks, "num_nodes": nodes}
        case["accelerator"] = "gpu" if device == "cuda" else "cpu"
    listing = out / f"cases_{nodes}x{ranks}.json"
    listing.write_text(json.dumps(cases))
    for code, output in finish(start([str(CASES), str(listing), str(out)], ranks, nodes, device), seconds):
        assert code == 0, output
    return {case["name"]: torch.load(out / f"{case['name']}.pt", weights_only=True) for case in cases}
