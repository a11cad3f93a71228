"""Sharded checkpoints: a folder to which every rank writes its shards, published complete or not at all.

    step_000500.ckpt/  .metadata, __<rank>_<n>.distcp   tensors, in PyTorch's distributed checkpoint format
                       state.pt                         all other entries, plain data
                       manifest.json                    size and SHA-256 of each file; written last

Tensors are named state_dict.<parameter> and optimizer_<i>.<parameter>.<field>, so that they can be read back by any
number of ranks, or unsharded by one process. All functions that write are collectives of `group`'s ranks.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.futures import Future

from switti.distributed.optimizer_state import (
    empty_state,
    fields_of,
    fill_state,
    ordered_names,
    shard_like,
    take_groups,
    take_states,
)
from switti.distributed.sharded_contents import read_contents
from switti.errors import UserError
from switti.files import (
    kind_of,
    open_regular,
    read_json,
    sha256_file,
    sync_file,
    sync_folder,
    temporary_beside,
    write_json,
)
from switti.suggestions import printable
from switti.weights.fill import WeightsError, mismatches
from switti.weights.read import weights_in
from switti.weights.torch_files import TorchFileError, load_tensor, read_torch

MANIFEST, STATE = "manifest.json", "state.pt"
MODEL = "state_dict"
# A process group, or None for the default one.
Group = Any


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a published sharded checkpoint."""
    return (Path(path) / MANIFEST).is_file()


def holds_shards(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's weights are sharded, so that every rank must write."""
    weights = checkpoint.get(MODEL)
    return isinstance(weights, dict) and any(isinstance(value, DTensor) for value in weights.values())


# ---- writing ----------------------------------------------------------------------------------------------------


def snapshot(value: Any) -> Any:
    """A copy of nested containers with all tensors in CPU memory, which further training does not change."""
    if isinstance(value, DTensor):
        local = value.to_local().detach().to("cpu", copy=True)
        return DTensor(local, value._spec, requires_grad=False)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def write_sharded(checkpoint: Mapping[str, Any], work: Path, group: Group = None) -> None:
    """Write Lightning's checkpoint as the folder `work`, synced, ready for `publish`.

    Raises RuntimeError, on every rank, if any of them fails; then nothing of it is left.
    """
    tensors, rest = _split(checkpoint)
    rank = dist.get_rank(group)
    try:
        _on_all_ranks(lambda: _make_empty(work) if rank == 0 else None, group)
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(work), process_group=group)
        except CheckpointException as error:
            raise RuntimeError(_first_failure(error)) from error
        entries = _on_all_ranks(lambda: _checksums(work, f"__{rank}_*.distcp"), group)
        _on_all_ranks(lambda: _finish(work, rest, entries) if rank == 0 else None, group)
    except RuntimeError:
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, the rest). The rest keeps the optimizers' groups with the names of their parameters."""
    rest = {key: value for key, value in checkpoint.items() if key not in (MODEL, "optimizer_states")}
    tensors = {f"{MODEL}.{key}": value for key, value in checkpoint[MODEL].items()}
    rest["optimizer_groups"] = []
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        rest["optimizer_groups"].append(optimizer["param_groups"])
        tensors |= _optimizer_tensors(index, optimizer)
    return tensors, rest


def _optimizer_tensors(index: int, optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"optimizer_{index}.{name}.{field}": value
        for name, fields in optimizer["state"].items()
        for field, value in fields.items()
    }


def _on_all_ranks(action: Callable[[], Any], group: Group) -> list[Any]:
    """Every rank's result; a failure of one is raised by all."""
    result, failure = None, None
    try:
        result = action()
    # Whatever it is: the other ranks wait for this one.
    except Exception as error:
        failure = reason(error)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, failure), group=group)
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise RuntimeError(failures[0])
    return [result for result, _ in outcomes]


def _first_failure(error: CheckpointException) -> str:
    cause = next(iter(error.failures.values()))[0]
    return reason(cause) if isinstance(cause, Exception) else str(cause)


def reason(error: Exception) -> str:
    """An error in one line: the operating system's message if it is one of its errors, or follows from one."""
    cause: BaseException | None = error
    while isinstance(cause, RuntimeError) and cause.__context__ is not None:
        # torch's writer raises its own error when a file has not grown as it should.
        cause = cause.__context__
    error = cause if isinstance(cause, OSError) else error
    text = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "")
    plain = isinstance(error, OSError | RuntimeError | UserError | TorchFileError)
    return str(text) if plain else f"{type(error).__name__}: {text}"


def _make_empty(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.parent.mkdir(exist_ok=True)
    work.mkdir()


def _checksums(work: Path, pattern: str) -> dict[str, Any]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(work.glob(pattern))
    }


def _finish(work: Path, rest: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
    """The rest and the manifest, which makes the folder a checkpoint."""
    with (work / STATE).open("wb") as stream:
        torch.save(rest, stream)
        stream.flush()
        os.fsync(stream.fileno())
    sync_file(work / ".metadata")
    files = {name: entry for part in entries for name, entry in part.items()}
    files |= _checksums(work, STATE) | _checksums(work, ".metadata")
    write_json(work / MANIFEST, {"format": 1, "world_size": len(entries), "files": files})
    sync_folder(work)


def publish(path: Path) -> None:
    """Give a file or folder that has been written beside `path` its name; a previous one is replaced."""
    if path.is_dir():
        remove(path)
    os.replace(temporary_beside(path), path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint, atomically for readers: the remains after a kill are hidden and cleared later."""
    if path.is_dir() and not path.is_symlink():
        doomed = temporary_beside(path.with_name(f"{path.name}.removed"))
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- reading ----------------------------------------------------------------------------------------------------


def corruption(path: Path, contents: bool = True) -> str | None:
    """What is wrong with a sharded checkpoint, or None. contents: compare all bytes, not only names and sizes."""
    try:
        manifest = read_json(path / MANIFEST)
        files = manifest["files"]
        for name, entry in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names {printable(name)}, which is not a file of this folder"
            file = path / name
            if (kind := kind_of(file)) != "file":
                return f"{name} is missing" if kind is None else f"{name} is a {kind}, not a regular file"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if contents and sha256_file(file) != entry["sha256"]:
                return f"{name} is corrupt"
    except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Unsharded tensors whose names begin with `prefix`, without it, in CPU memory. One process suffices."""
    reader = _Reader(path)
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _entries(reader.read_metadata()).items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        _load(path, wanted, reader, single=True)
    return {name.removeprefix(prefix): value for name, value in wanted.items()}


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, except that nothing in the files is called and nothing outside the folder is read."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        metadata = read_contents(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planned tensors, part by part in the order of the files' bytes."""
        places = [(self.storage_data[item.storage_index], item) for item in plan.items]
        for place, item in sorted(places, key=lambda pair: (pair[0].relative_path, pair[0].offset)):
            with open_regular(Path(self.path) / place.relative_path) as stream:
                stream.seek(place.offset)
                content = stream.read(place.length)
            part = load_tensor(content)
            part = part[tuple(map(slice, item.storage_offsets, map(add, item.storage_offsets, item.lengths)))]
            target = planner.resolve_tensor(item).detach()
            if target.shape != part.shape:
                raise UserError(
                    f"a part of {printable(item.dest_index.fqn)} has another size than the list of contents says"
                )
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _load(path: Path, wanted: dict[str, Any], reader: _Reader, single: bool = False) -> None:
    """Fill `wanted`. Raises UserError, on all ranks, if one of them cannot read its part."""
    try:
        dcp.load(wanted, storage_reader=reader, no_dist=single)
    except CheckpointException as error:
        raise UserError(f"{path} cannot be read: {_first_failure(error)}; copy it again") from error


def _entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_unsharded(path: Path) -> dict[str, Any]:
    """The checkpoint as a run on one device would have written it: unsharded tensors, numbered parameters."""
    checkpoint = read_torch(path / STATE)
    checkpoint[MODEL] = read_tensors(path, f"{MODEL}.")
    checkpoint["optimizer_states"] = []
    for index, groups in enumerate(take_groups(checkpoint, path / STATE)):
        tensors = read_tensors(path, f"optimizer_{index}.")
        names = [name for group in groups for name in group["params"]]
        state = {number: fields for number, name in enumerate(names) if (fields := fields_of(tensors, name))}
        numbers = {name: number for number, name in enumerate(names)}
        numbered = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
        checkpoint["optimizer_states"].append({"state": state, "param_groups": numbered})
    return checkpoint


def load_into(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Fill a sharded model and its optimizers in place; returns the rest of the checkpoint.

    path: a sharded checkpoint of any world size, or an unsharded file, from which each rank takes its shard. Raises
    WeightsError naming every parameter that is missing, unexpected or of another shape.
    """
    if not is_sharded(path):
        return _load_unsharded(path, model, optimizers)
    rest = read_torch(path / STATE)
    groups_of_each = take_groups(rest, path / STATE)
    if len(groups_of_each) != len(optimizers):
        raise UserError(f"{path} holds {len(groups_of_each)} optimizers, the run has {len(optimizers)}")
    reader = _Reader(path)
    entries = _entries(reader.read_metadata())
    tensors: dict[str, Any] = {f"{MODEL}.{k}": v for k, v in get_model_state_dict(model).items()}
    states = [
        empty_state(model, optimizer, f"optimizer_{i}", entries) for i, optimizer in enumerate(optimizers)
    ]
    for index, state in enumerate(states):
        tensors |= _optimizer_tensors(index, {"state": state})
    stored = {
        name: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for name, e in entries.items()
    }
    if problems := mismatches(tensors, stored):
        raise WeightsError(str(path), problems)
    _load(path, tensors, reader)
    set_model_state_dict(model, {name: tensors[f"{MODEL}.{name}"] for name in get_model_state_dict(model)})
    for optimizer, state, groups in zip(optimizers, states, groups_of_each, strict=True):
        fill_state(model, optimizer, state, groups)
    return rest


def _load_unsharded(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    checkpoint = read_torch(path, mmap=True)
    options = StateDictOptions(full_state_dict=True)
    weights = weights_in(checkpoint, path)
    checkpoint.pop(MODEL, None)
    if problems := mismatches(model.state_dict(), weights):
        raise WeightsError(str(path), problems)
    set_model_state_dict(model, dict[str, Any](weights), options=options)
    parameters = dict(model.named_parameters())
    for optimizer, numbered in zip(optimizers, take_states(checkpoint, len(optimizers), path), strict=True):
        names = ordered_names(model, optimizer)
        if any(type(number) is not int or number >= len(names) for number in numbered["state"]):
            raise UserError(f"{path} holds the state of an optimizer with other parameters than the run's")
        state = {
            names[number]: {
                key: shard_like(v, parameters[names[number]]).clone() for key, v in fields.items()
            }
            for number, fields in numbered["state"].items()
        }
        fill_state(model, optimizer, state, numbered["param_groups"])
    return checkpoint
