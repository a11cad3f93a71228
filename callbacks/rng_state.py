"""Random states, settings and code version: what a checkpoint holds besides weights, optimizer and data position."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run_record import git_state, versions
from switti.distributed.collectives import all_gather_object

RandomState = dict[str, Any]


class RngState(Callback):
    """Training steps draw from a random stream of their own, one per rank, which resumes exactly.

    What is drawn between steps, by validation, loaders or sampling, does not shift it. A checkpoint holds the streams
    of all ranks; additional ranks begin new ones. config: the run's settings as plain containers.
    Must be the first of the callbacks, so that the others' draws are not taken for a step's.
    """

    def __init__(self, seed: int, config: dict[str, Any]) -> None:
        self.seed, self.config = seed, config
        self._state: RandomState | None = None
        self._code = {**git_state(Path(__file__).parent), "versions": versions()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._state is None:
            stream = np.random.SeedSequence([self.seed, trainer.global_step, trainer.global_rank])
            first, second, third = (int(word) for word in stream.generate_state(3))
            torch.manual_seed(first)
            np.random.seed(second)
            random.seed(third)
            self._state = read_random_state(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._state is not None:
            set_random_state(self._state, pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._state = read_random_state(pl_module.device)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["random"] = all_gather_object(self._state)
        checkpoint["config"] = self.config
        checkpoint["code"] = self._code

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get("random", [])
        self._state = states[trainer.global_rank] if trainer.global_rank < len(states) else None


def read_random_state(device: torch.device) -> RandomState:
    """States of torch (and of the device's generator), NumPy and Python, as plain values."""
    kind, keys, *rest = np.random.get_state()
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """The reverse; a state without a device's generator leaves that as it is."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
