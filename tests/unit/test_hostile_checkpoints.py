"""Checkpoints made by an enemy: nothing in them is carried out, and every command ends in one line."""

import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from payloads import Payload, payloads
from torch import nn

from callbacks.checkpoint_io import AtomicCheckpointIO
from configs.loading import load, to_yaml
from configs.schema import RunConfig
from experiments import analyse, consolidate, evaluate, export, sample
from experiments.trained import initial_state
from switti.errors import UserError
from switti.files import sha256_file, write_json
from switti.models.rqvae import RQVAE, save_rqvae
from switti.models.transformer import ScaleTransformer
from switti.sharded import MANIFEST, STATE, is_sharded, load_into, read_plain, read_tensors
from switti.sharded_contents import CONTENTS

NAMES = [payload.name for payload in payloads(Path("mark"), Path("victim"))]


def seal(checkpoint: Path) -> None:
    """Give a folder a manifest in which every digest is right, as somebody who made the files would."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in checkpoint.iterdir()
        if path.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {"format": 1, "world_size": 1, "files": files})


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and the run `single/one`, whose only checkpoint is a sharded one."""
    folder = tmp_path_factory.mktemp("origin")
    config = load(
        "generator/tiny", [f"runs_dir={folder}", f"tokenizer_weights={folder}/t.safetensors", "name=one"]
    )
    save_rqvae(RQVAE(config.tokenizer), folder / "t.safetensors")
    checkpoint = config.run_dir / "checkpoints" / "step_000008.ckpt"
    checkpoint.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    state = ScaleTransformer(config.model).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {f"state_dict.generator.{key}": value for key, value in state.items()},
            storage_writer=dcp.FileSystemWriter(checkpoint),
            no_dist=True,
        )
    torch.save({"global_step": 8, "optimizer_groups": []}, checkpoint / STATE)
    seal(checkpoint)
    return folder


@pytest.fixture
def checkpoint(origin: Path, tmp_path: Path) -> Path:
    """A copy of the run's checkpoint that a test may spoil."""
    shutil.copytree(origin / "single", tmp_path / "single")
    return tmp_path / "single/one/checkpoints/step_000008.ckpt"


def run_of(checkpoint: Path) -> str:
    return str(checkpoint.parent.parent)


def settings(checkpoint: Path) -> RunConfig:
    return load(Path(run_of(checkpoint)) / "config.yaml", [])


def from_initial(checkpoint: Path) -> Any:
    config = settings(checkpoint)
    return initial_state(str(checkpoint), config, RQVAE(config.tokenizer))


READERS: dict[str, Callable[[Path], Any]] = {
    "tensors": read_tensors,
    "as one device would have written it": read_plain,
    "resume": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "resume by many ranks": lambda path: load_into(path, nn.Linear(1, 1), []),
}
COMMANDS: dict[str, Callable[[Path], Any]] = {
    "init_from": from_initial,
    "sample": lambda path: sample.main([str(path), "a cat", "--out", str(path.parent / "a.png")]),
    "export": lambda path: export.main([str(path), "--out", str(path.parent / "out")]),
    "consolidate": lambda path: consolidate.main([run_of(path), "--out", str(path.parent / "out")]),
    "evaluate": lambda path: evaluate.main([run_of(path)]),
    "analyse": lambda path: analyse.main(
        ["guidance-off", run_of(path), "a cat", "--out", str(path.parent / "out")]
    ),
}


def test_the_checkpoint_can_be_read_before_it_is_spoilt(checkpoint: Path) -> None:
    assert is_sharded(checkpoint)
    assert (
        read_tensors(checkpoint, "state_dict.generator.").keys()
        == ScaleTransformer(settings(checkpoint).model).state_dict().keys()
    )
    assert sample.main([run_of(checkpoint), "a cat", "--out", str(checkpoint.parent / "a.png")]) == 0


def refused(read: Callable[[Path], Any], path: Path) -> str:
    """The one line with which a reader ends."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 500, message
    return message


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_list_of_contents_is_carried_out(name: str, checkpoint: Path, tmp_path: Path) -> None:
    mark, victim = tmp_path / "mark", tmp_path / "victim"
    torch.save({"weight": torch.ones(2)}, victim)
    (payload,) = [item for item in payloads(mark, victim) if item.name == name]
    (checkpoint / CONTENTS).write_bytes(payload.content)
    seal(checkpoint)
    # A command composes settings, which takes long: each meets some of the payloads.
    commands = COMMANDS if NAMES.index(name) % 8 == 0 else {}
    for reader, read in (READERS | commands).items():
        assert CONTENTS in refused(read, checkpoint), reader
        assert not mark.exists() and victim.exists(), reader
    assert carried_out(payload, mark, victim) == payload.live


def carried_out(payload: Payload, mark: Path, victim: Path) -> bool:
    """Whether Python's own unpickler would have done it: otherwise the test above could not fail."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pickle.loads(payload.content)
    except Exception:
        pass
    end = time.monotonic() + (2 if payload.live else 0)
    while not (mark.exists() or not victim.exists()) and time.monotonic() < end:
        time.sleep(0.01)  # one of them starts a process
    return mark.exists() or not victim.exists()
