"""Read, the first of the four steps of loading: any kind of weights as flat tensors and the settings stored with them.

    read → describe → fit → fill

Nothing executable is read. A source is a hub id, an exported or published folder, or a file of any usual kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from switti.errors import UserError, first_line
from switti.files import check_regular, kind_of, read_json_object
from switti.suggestions import printable
from switti.weights.hub import fetch
from switti.weights.published import GENERATORS, TOKENIZERS, Release
from switti.weights.tokenizer_file import EMBEDDED, GENERATOR_KEY, stored_settings, weights_path
from switti.weights.torch_files import read_torch

Part = Literal["generator", "tokenizer"]

INDEX, CONFIG = "model_index.json", "config.json"
MAX_CONFIG_BYTES = 1 << 20
TORCH_FILES = (".ckpt", ".pth", ".pt", ".bin")
WEIGHT_FILES = (".safetensors", *TORCH_FILES)
_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN = 6


@dataclass(frozen=True)
class Contents:
    """What a source holds, before anything is concluded from it.

    source: as the user gave it, for messages. tensors: by their keys, mapped rather than copied. config: the
    config.json beside the file, or {}. metadata: the settings that our own files store in their header, or {}.
    """

    source: str
    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, Any]
    release: Release | None

    @property
    def stored(self) -> dict[str, Any]:
        """All settings stored with the weights; config.json overrides the file's own."""
        return self.metadata | self.config


def read_generator(source: str | Path, *, averaged: bool = True, revision: str | None = None) -> Contents:
    """averaged: of a training checkpoint that holds an EMA, the EMA."""
    path, config = locate(source, "generator", revision=revision)
    modules = ("ema_generator", "generator") if averaged else ("generator",)
    tensors, metadata = _unwrap(read_weights(path), modules), stored_settings(path, GENERATOR_KEY)
    return Contents(str(source), path, tensors, config, metadata, GENERATORS.get(str(source)))


def read_tokenizer(source: str | Path, *, revision: str | None = None, cached: bool = False) -> Contents:
    """source may also be embedded:NAME, a tokenizer that ships. cached: a hub id must have been downloaded."""
    release = TOKENIZERS.get(str(source))
    place = weights_path(source) if str(source).startswith(EMBEDDED) else source
    path, config = locate(place, "tokenizer", release.file if release else None, revision, cached)
    tensors = _unwrap(read_weights(path), ("ema_rqvae", "rqvae"))
    return Contents(str(source), path, tensors, config, stored_settings(path), release)


def _unwrap(state: dict[str, Tensor], modules: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of the first of these modules that a training checkpoint holds; any other file's are all meant."""
    return next((part for name in modules if (part := sub_state(state, name))), state)


def locate(
    source: str | Path,
    part: Part,
    file: str | None = None,
    revision: str | None = None,
    cached: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """(weights file, content of the config.json beside it or {}) of a file, a folder or a hub id.

    part: the subfolder of an exported pipeline. file: the wanted file of a hub repository. cached: no network is asked.
    """
    wanted = [file] if file else [CONFIG, INDEX, *_FILES, f"{part}/*"]
    path = fetch(source, wanted, revision, cached)
    if path.is_dir() and kind_of(path / INDEX):
        path = path / part
    if path.is_dir():
        names = [file] if file else list(_FILES)
        folder, path = path, next((path / n for n in names if kind_of(path / n)), path)
        if path == folder:
            raise UserError(f"{source}: {folder} holds none of {', '.join(names)}")
    return path, read_json_object(path.with_name(CONFIG), MAX_CONFIG_BYTES)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or of a flat state dict written by torch.save (.pth, .pt, .bin, .ckpt).

    A dict around it under "state_dict" (Lightning) is opened; tensors are mapped, not copied, until they are used.
    Raises UserError for a file that is missing, cut off, of another kind or carries code.
    """
    path = Path(path)
    if kind_of(path) is None:
        raise UserError(f"no weights {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(check_regular(path))
        except (SafetensorError, OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"{path} is not a complete safetensors file ({reason}); copy or download it again"
            ) from error
    if path.suffix not in TORCH_FILES:
        raise UserError(f"{path} is not a weights file; known are {', '.join(WEIGHT_FILES)}")
    return weights_in(read_torch(path, mmap=True), path)


def weights_in(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of a file of torch.save with this content: under "state_dict", or all of it.

    Raises UserError for anything but tensors by name.
    """
    state = content.get("state_dict", content)
    named = isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not named or not state:
        actual = ", ".join(printable(key) for key in list(content)[:_SHOWN])
        raise UserError(f"{path} holds no weights but {actual or 'nothing'}")
    return dict(state)


def sub_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a module name, without it."""
    return {
        key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")
    }
