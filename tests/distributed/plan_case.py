"""A program that every rank runs: trains two steps of a config and says how much memory that took.

    torchrun --nproc-per-node=2 tests/distributed/plan_case.py OUT CONFIG [setting=value …]

Each rank writes OUT/<rank>.json.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from benchmarks.cost_model.simulated_step import measure
from configs.loading import load

if __name__ == "__main__":
    out, config, *settings = sys.argv[1:]
    dist.init_process_group("gloo")
    peak = measure(load(config, settings)).peak
    (Path(out) / f"{dist.get_rank()}.json").write_text(json.dumps(peak))
    dist.destroy_process_group()
