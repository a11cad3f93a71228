"""Checks of folders in transformers format, before transformers opens them and builds what they describe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switti.errors import UserError
from switti.files import kind_of, read_json_object
from switti.suggestions import printable
from switti.weights.torch_files import check_torch_file

_SETTINGS = (
    "config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "generation_config.json",
)  # fmt: skip
_SIZES = (
    "_size",
    "_layers",
    "_heads",
    "_dim",
    "_embeddings",
    "_width",
    "_channels",
    "image_size",
    "patch_size",
)
_MAX_BYTES = 4 << 20
# A vocabulary has 49,408 words, a network a width of 1,280.
_LARGEST = 1 << 20
_DEEPEST = 256
# What would make transformers import code, or ask a hub for another network.
_FOREIGN = (
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
)


def check_folder(folder: Path, setting: str) -> None:
    """UserError, naming `setting`, for a folder that holds more than a network of a usual size and plain weights."""
    try:
        for path in sorted(folder.iterdir()):
            kind = kind_of(path)
            if kind not in ("file", "folder"):
                raise UserError(f"{path} is {'missing' if kind is None else f'a {kind}'}, not a regular file")
            if path.name.startswith("adapter_"):
                raise UserError(f"{path}: adapters are not read; remove it")
            if path.suffix in (".bin", ".pt", ".pth"):
                check_torch_file(path)
        for name in _SETTINGS:
            _check_settings(folder / name)
    except OSError as error:
        raise UserError(f"{setting}: {error.filename or folder} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


def _check_settings(path: Path) -> None:
    for name, value in _entries(read_json_object(path, _MAX_BYTES)):
        if name in _FOREIGN and value is not None:
            raise UserError(f"{path}: {name} asks for more than this network's own code; remove it")
        most = _DEEPEST if "layer" in name else _LARGEST
        if type(value) is int and abs(value) > most and name.endswith(_SIZES):
            raise UserError(f"{path}: {printable(name)}={printable(value)} is larger than {most}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every name with its value, at all depths (which `parse_json` limits)."""
    if isinstance(value, dict):
        yield from value.items()
        for item in value.values():
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)
