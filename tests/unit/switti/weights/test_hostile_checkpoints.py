"""Checkpoints made by an enemy: nothing in them is carried out, and every command ends in one line."""

import contextlib
import io
import json
import os
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
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from callbacks.checkpoint_io import AtomicCheckpointIO
from configs.load_run import load_initial_state
from configs.loading import load, to_yaml
from configs.schema import RunConfig
from experiments import analyse, compare, evaluate, export, sample
from switti.distributed.sharded_checkpoint import (
    MANIFEST,
    STATE,
    corruption,
    is_sharded,
    load_into,
    read_tensors,
    read_unsharded,
)
from switti.distributed.sharded_contents import CONTENTS
from switti.errors import UserError
from switti.files import sha256_file, write_json
from switti.models.transformer import ScaleTransformer
from switti.tokenizer.rqvae import RQVAE
from switti.weights.save import save_tokenizer

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
    save_tokenizer(RQVAE(config.tokenizer), folder / "t.safetensors")
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
    return load_initial_state(str(checkpoint), config, RQVAE(config.tokenizer))


READERS: dict[str, Callable[[Path], Any]] = {
    "tensors": read_tensors,
    "as one device would have written it": read_unsharded,
    "resume": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "resume by many ranks": lambda path: load_into(path, nn.Linear(1, 1), []),
}
COMMANDS: dict[str, Callable[[Path], Any]] = {
    "init_from": from_initial,
    "sample": lambda path: sample.main([str(path), "a cat", "--out", str(path.parent / "a.png")]),
    "export": lambda path: export.main([str(path), "--out", str(path.parent / "out")]),
    "verify": lambda path: export.main([run_of(path), "--verify", "--out", str(path.parent / "out")]),
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


# ---- contents that lie ------------------------------------------------------------------------------------------


def rewritten(checkpoint: Path, change: Callable[[Metadata], Any]) -> None:
    """The list of contents after a change; it is the test's own, so that it may be unpickled."""
    contents = pickle.loads((checkpoint / CONTENTS).read_bytes())
    change(contents)
    (checkpoint / CONTENTS).write_bytes(pickle.dumps(contents))


def places(contents: Metadata, **changes: Any) -> None:
    """Give one tensor's place other values."""
    place = next(iter(contents.storage_data.values()))
    for name, value in changes.items():
        setattr(place, name, value)


def first(contents: Metadata) -> Any:
    return next(item for item in contents.state_dict_metadata.values() if item.size)


def larger(contents: Metadata) -> None:
    """A tensor of 2^60 numbers in one chunk."""
    entry, size = first(contents), torch.Size([2**60])
    entry.size, entry.chunks = size, [ChunkStorageMetadata(torch.Size([0]), size)]
    for name, found in contents.state_dict_metadata.items():
        if found is entry:
            contents.storage_data[MetadataIndex(name, torch.Size([0]))] = next(
                iter(contents.storage_data.values())
            )


def shifted(contents: Metadata) -> None:
    chunk = first(contents).chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] - 1, *chunk.sizes[1:]])


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Something else in place of one of the checkpoint's files."""

    def act(checkpoint: Path) -> None:
        content = checkpoint / name
        size = content.stat().st_size
        content.unlink()
        make(content)
        manifest = json.loads((checkpoint / MANIFEST).read_text()) if name != MANIFEST else {}
        if manifest:
            manifest["files"][name] = {"bytes": size, "sha256": ""}
            (checkpoint / MANIFEST).write_text(json.dumps(manifest))

    return act


def first_part(checkpoint: Path, value: Any, **options: Any) -> None:
    """Another file of torch.save in place of the first tensor's, padded to its length."""
    contents = pickle.loads((checkpoint / CONTENTS).read_bytes())
    place = min(contents.storage_data.values(), key=lambda item: (item.offset, item.length))
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    data = checkpoint / place.relative_path
    place.offset = data.stat().st_size
    place.length = max(len(stream.getvalue()), place.length)
    data.write_bytes(data.read_bytes() + stream.getvalue().ljust(place.length, b"\0"))
    (checkpoint / CONTENTS).write_bytes(pickle.dumps(contents))


def listed(change: Callable[[Metadata], Any]) -> Callable[[Path], Any]:
    return lambda checkpoint: rewritten(checkpoint, change)


DATA = "__0_0.distcp"
LIES: dict[str, Callable[[Path], Any]] = {
    "a file above": listed(lambda c: places(c, relative_path=f"../{DATA}")),
    "a file of the system": listed(lambda c: places(c, relative_path="/etc/passwd")),
    "a device": listed(lambda c: places(c, relative_path="/dev/zero")),
    "the way round": listed(lambda c: places(c, relative_path=f"../step_000008.ckpt/{DATA}")),
    "another file of the folder": listed(lambda c: places(c, relative_path=STATE)),
    "no file": listed(lambda c: places(c, relative_path="__9_9.distcp")),
    "a name with escapes": listed(lambda c: places(c, relative_path="\x1b[31m\n" * 1000)),
    "a place that is a number": listed(lambda c: places(c, relative_path=7)),
    "beyond the file": listed(lambda c: places(c, offset=2**40)),
    "longer than the file": listed(lambda c: places(c, length=2**40)),
    "a negative place": listed(lambda c: places(c, offset=-1)),
    "a shared place": listed(lambda c: [setattr(item, "offset", 0) for item in c.storage_data.values()]),
    "a transformed tensor": listed(lambda c: places(c, transform_descriptors=["stream.zstd/1"])),
    "no places": listed(lambda c: setattr(c, "storage_data", None)),
    "no tensors": listed(lambda c: setattr(c, "state_dict_metadata", None)),
    "a tensor of 2^60 numbers": listed(larger),
    "chunks with a gap": listed(shifted),
    "no chunks": listed(lambda c: first(c).chunks.clear()),
    "a chunk twice": listed(lambda c: first(c).chunks.append(first(c).chunks[0])),
    "a layout for a type": listed(lambda c: setattr(first(c).properties, "dtype", torch.strided)),
    "a number for contents": lambda checkpoint: (checkpoint / CONTENTS).write_bytes(pickle.dumps(3)),
    "no contents": lambda checkpoint: (checkpoint / CONTENTS).unlink(),
    "a part of another shape": lambda checkpoint: first_part(checkpoint, torch.ones(3, 5, 7)),
    "a part that is a dict": lambda checkpoint: first_part(checkpoint, {"a": torch.ones(3)}),
    "a part of an old torch": lambda checkpoint: first_part(
        checkpoint, torch.ones(3), _use_new_zipfile_serialization=False
    ),
    "a part of one number repeated": lambda checkpoint: first_part(checkpoint, torch.ones(1).expand(2**20)),
    **{f"FIFO for {name}": replaced(name, os.mkfifo) for name in (DATA, CONTENTS, STATE, MANIFEST)},
    **{
        f"device for {name}": replaced(name, lambda path: path.symlink_to("/dev/zero"))
        for name in (DATA, CONTENTS, STATE, MANIFEST)
    },
    **{f"folder for {name}": replaced(name, Path.mkdir) for name in (DATA, CONTENTS, STATE, MANIFEST)},
}


@pytest.mark.parametrize("name", LIES)
def test_contents_that_lie_are_refused(name: str, checkpoint: Path) -> None:
    LIES[name](checkpoint)
    # Without a manifest a folder is not a checkpoint at all, which commands say.
    if "manifest" not in name:
        refused(read_unsharded, checkpoint)
    if " for " not in name:
        seal(checkpoint)
    for command in ("init_from", "sample", "verify")[:: 1 if list(LIES).index(name) % 8 == 0 else 2]:
        refused(COMMANDS[command], checkpoint)


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "{", '{"files": []}', '{"files": {"../a": {"bytes": 1, "sha256": ""}}}', '{"files": {"a": 3}}',
     '{"files": {"a": {}}}', "[" * 100_000, '{"files": ' + '{"a":' * 100_000],
)  # fmt: skip
def test_a_manifest_that_is_none_is_named(content: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(content)
    assert corruption(checkpoint)
    refused(COMMANDS["verify"], checkpoint)


# ---- checkpoints in one file, whose contents are odd -----------------------------------------------------------


def odd(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def act(content: dict[str, Any]) -> dict[str, Any]:
        change(content)
        return content

    return act


ODD: dict[str, Callable[[dict[str, Any]], dict[Any, Any]]] = {
    "nothing": lambda content: {},
    "no names": lambda content: {1: 2},
    **{
        f"weights are {value!r}": odd(lambda content, value=value: content.update(state_dict=value))
        for value in (None, 3, [1], "x", {}, {"a": 3}, {3: 4})
    },
    "a key with escapes": odd(
        lambda content: content["state_dict"].update({"generator.\x1b[2J": torch.ones(1)})
    ),
    "a number among weights": odd(lambda content: content["state_dict"].update({"generator.pos_start": 3})),
    "complex weights": odd(
        lambda content: content["state_dict"].update(
            {"generator.pos_start": content["state_dict"]["generator.pos_start"].to(torch.complex64)}
        )
    ),
    **{
        f"step is {value!r}": odd(lambda content, value=value: content.update(global_step=value))
        for value in (None, "8", [8], -1, 2**600, float("nan"), torch.ones(3))
    },
}


@pytest.mark.parametrize("name", ODD)
def test_odd_contents_are_named(name: str, checkpoint: Path) -> None:
    content = {"state_dict": read_unsharded(checkpoint)["state_dict"], "global_step": 8}
    shutil.rmtree(checkpoint)
    torch.save(ODD[name](content), checkpoint)
    for command in ("sample", "export") if list(ODD).index(name) % 6 == 0 else ("export",):
        assert str(checkpoint) in refused(COMMANDS[command], checkpoint)
    if not name.startswith(("step", "a key", "complex")):
        refused(READERS["resume"], checkpoint)
        refused(READERS["resume by many ranks"], checkpoint)


@pytest.mark.parametrize(
    "groups", [None, 3, [3], [[3]], [[{}]], [[{"params": 3}]], [[{"params": [3]}]]], ids=str
)
def test_groups_of_parameters_that_are_none(groups: Any, checkpoint: Path) -> None:
    torch.save({"global_step": 8, "optimizer_groups": groups}, checkpoint / STATE)
    assert "no groups of parameters" in refused(read_unsharded, checkpoint)
    assert "no groups of parameters" in refused(READERS["resume by many ranks"], checkpoint)


@pytest.mark.parametrize("states", [None, {}, [], [3], [{"state": 3}], [{"state": {0: 3}}], [{"state": {}}],
                                    [{"state": {7: {}}, "param_groups": []}]], ids=str)  # fmt: skip
def test_states_of_optimizers_that_are_none(states: Any, checkpoint: Path) -> None:
    model = nn.Linear(1, 1)
    shutil.rmtree(checkpoint)
    torch.save({"state_dict": model.state_dict(), "optimizer_states": states}, checkpoint)
    optimizer = torch.optim.AdamW(model.parameters())
    assert "optimizer" in refused(lambda path: load_into(path, model, [optimizer]), checkpoint)


def test_reports_read_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    mark, victim = tmp_path / "mark", tmp_path / "victim"
    victim.touch()
    content = next(item.content for item in payloads(mark, victim) if item.name == "os.system")
    (checkpoint / CONTENTS).write_bytes(content)
    (checkpoint / STATE).write_bytes(content)
    with contextlib.suppress(UserError):
        compare.main([run_of(checkpoint), "--out", str(tmp_path / "report")])
    assert not mark.exists()


@pytest.mark.parametrize(
    "entries",
    [{"loops": [1]}, {"pytorch-lightning_version": None}, {"optimizer_states": 3}, {"optimizer_states": [3]},
     {"lr_schedulers": [3]}, {"random": "x"}, {"random": [1]}, {"ShardDataModule": [1]}, {"callbacks": [3]},
     {"global_step": "x"}, {"global_step": -1}, {"epoch": 1.5}, {"tokenizer_codes": torch.ones(2)}],
    ids=str,
)  # fmt: skip
def test_what_a_run_resumes_from_has_the_form_of_a_run(entries: dict[str, Any], checkpoint: Path) -> None:
    whole = {"state_dict": {"a": torch.ones(1)}, "global_step": 8, "pytorch-lightning_version": "2.6"}
    shutil.rmtree(checkpoint)
    torch.save(whole, checkpoint)
    assert AtomicCheckpointIO().load_checkpoint(checkpoint)["global_step"] == 8
    torch.save(whole | entries, checkpoint)
    assert f"its {next(iter(entries))} is" in refused(READERS["resume"], checkpoint)
