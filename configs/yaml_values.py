"""YAML files and values, read within limits. Imports no torch."""

import io
import json
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from switti.errors import UserError
from switti.files import read_bytes

# A file of all settings takes 5 KB; YAML is read at some 100 KB a second.
MAX_YAML_BYTES = 1 << 18
# No setting needs an integer of more bits.
_LARGEST = 1 << 63


def read_yaml(path: Path) -> dict[str, Any]:
    """One file as plain containers, interpolations untouched. Duplicate keys and broken YAML are UserErrors."""
    try:
        text = read_bytes(path, MAX_YAML_BYTES).decode()
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    # ValueError: not UTF-8, or an integer of too many digits.
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` settings")
    if _is_too_large(content):
        raise UserError(f"{path} holds an integer of more than 64 bits")
    return cast(dict[str, Any], content)


def parse_yaml(text: str) -> Any:
    """The value of `text` on the command line. ValueError if it is not YAML, or an integer of more than 64 bits."""
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{text} is not YAML") from error
    if _is_too_large(value):
        raise ValueError(f"{text} is too large")
    return value


def parse_yaml_or_text(text: str) -> Any:
    """The same; text that is not a YAML value stays text."""
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def text_of(value: Any) -> str:
    """A value as it is written on the command line; JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def is_64_bit(number: float) -> bool:
    """Whether a number is within the range of integers that settings take."""
    return abs(number) < _LARGEST


def _is_too_large(value: Any) -> bool:
    """Whether it holds an integer of more than 64 bits; Python does not even print some of them."""
    if isinstance(value, dict):
        return any(map(_is_too_large, (*value, *value.values())))
    if isinstance(value, list):
        return any(map(_is_too_large, value))
    return isinstance(value, int) and not is_64_bit(value)
