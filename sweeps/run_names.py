"""Names of a study's runs: folder names made of what is varied. Imports no torch.

A name is a function of the run's own values alone, so that a run keeps its folder when the study grows.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from configs.yaml_values import text_of
from switti.run_folder import LONGEST_NAME

# Characters that a shortened value keeps, and of its digest.
_HEAD, _DIGITS = 24, 8


def run_name(label: str, values: Mapping[str, Any], brief: bool = False) -> str:
    """`label,setting=value,…` with the last parts of the settings' names as far as they differ.

    label: a named point's or a trial's own name, or "". brief: the label is unique, so that numbers may be rounded.
    """
    parts = {_short(name, values): _brief(value) if brief else value for name, value in values.items()}
    name = _join(label, {short: folder_text(value) for short, value in parts.items()})
    if len(name.encode()) <= LONGEST_NAME:
        return name
    name = _join(label, {short: _digested(value) for short, value in parts.items()})
    if len(name.encode()) <= LONGEST_NAME:
        return name
    length = LONGEST_NAME - _DIGITS - 1
    return f"{name.encode()[:length].decode(errors='ignore')}-{_digest(name)}"


def folder_text(value: Any) -> str:
    """A value as a part of a folder's name: what is not a letter, digit, sign, point or underscore becomes a dash."""
    words = re.sub(r"[^\w.+-]+", "\0", text_of(value)).strip("\0")  # brackets and quotes are not signs
    return words.replace("\0", "-") or "empty"


def _join(label: str, texts: Mapping[str, str]) -> str:
    parts = [f"{name}={text}" for name, text in texts.items()]
    return ",".join([label, *parts] if label else parts)


def _short(name: str, names: Mapping[str, Any]) -> str:
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in names) == 1 else name


def _brief(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _digested(value: Any) -> str:
    text = folder_text(value)
    return text if len(text) <= _HEAD + _DIGITS else f"{text[:_HEAD]}-{_digest(text_of(value))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
