"""Headers of safetensors files, read without torch: stored settings and shapes; and where tokenizers that ship lie."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from switti.errors import UserError
from switti.files import check_regular, parse_json
from switti.tokenizer.config import RQVAEConfig

EMBEDDED = "embedded:"
# In the metadata of files of `save_tokenizer` and `save_generator`: the settings as JSON.
SETTINGS_KEY, GENERATOR_KEY = "tokenizer", "generator"


def weights_path(weights: str | Path) -> Path:
    """File behind a `tokenizer_weights` setting: a path, or "embedded:NAME" for what the package ships.

    UserError if the package ships no tokenizer of that name.
    """
    text = str(weights)
    if not text.startswith(EMBEDDED):
        return Path(text).expanduser()
    name = text.removeprefix(EMBEDDED)
    assets = Path(str(resources.files("switti") / "assets"))
    shipped = sorted(folder.name.removesuffix("_tokenizer") for folder in assets.glob("*_tokenizer"))
    if name not in shipped:
        raise UserError(
            f"{text} is not shipped; the package has {', '.join(EMBEDDED + one for one in shipped)}"
        )
    return assets / f"{name}_tokenizer" / "model.safetensors"


def stored_settings(path: Path, key: str = SETTINGS_KEY) -> dict[str, Any]:
    """The settings that `save_tokenizer` or `save_generator` stored in a file; {} for any other file."""
    return read_header(path, key)[0] if path.suffix == ".safetensors" else {}


def read_header(path: Path, key: str = SETTINGS_KEY) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(settings or {}, name → shape of each tensor) of a safetensors file. UserError if it cannot be read."""
    try:
        with safe_open(check_regular(path), "np") as file:
            settings = parse_json((file.metadata() or {}).get(key, "{}"))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: its {key} metadata must hold one JSON object")
    return settings, shapes


def check_settings(
    config: RQVAEConfig, stored: Mapping[str, Any], path: Path, other_scales: bool = False
) -> None:
    """UserError if weights were trained with other settings, of which shapes show only a part.

    The commitment is let pass, as it only trains; other_scales: the pyramid too, which no weight depends on.
    """
    passed = {"commitment", "scales"} if other_scales else {"commitment"}
    wrong = [
        f"tokenizer.{name}={value} (the weights: {stored[name]})"
        for name, value in asdict(config).items()
        if name not in passed and stored.get(name, value) != value
    ]
    if wrong:
        raise UserError(f"{path} was trained with other settings: " + ", ".join(wrong))
