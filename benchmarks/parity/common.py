"""Golden tensors: reading a folder of them, comparing with tolerances, and tracking what it lacks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from switti.errors import UserError
from switti.files import check_regular, read_json_object
from switti.weights.fill import mismatches

# In float32, see the data's own description; [-1, 1] images amplify the latent's rounding about tenfold.
FEATURE_TOLERANCE = 1e-4
IMAGE_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3

# Of a golden pyramid; the released ones have up to 9 451.
TOKENS = 1 << 20
META = "meta.json"
# Settings and expected numbers of a folder without tensors.
NUMBERS = "golden.json"
INVENTORY = "inventory.json"
# What wrong shapes, types and values in a folder make of a computation, each of which is a failed check by name.
_COMPUTING = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, UserError,
)  # fmt: skip


class AbsentError(Exception):
    """A tensor, setting or file that a computation needs and the folder leaves out."""


@dataclass
class Check:
    """Worst deviation of one quantity.

    exact: the deviation is a number of unequal elements, which must be 0. reason: of a failure other than a deviation.
    """

    quantity: str
    deviation: float
    tolerance: float
    exact: bool = False
    reason: str = ""

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.deviation <= self.tolerance


def close(quantity: str, actual: Tensor, expected: Tensor, tolerance: float) -> Check:
    """Largest absolute difference; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return _misshapen(quantity, actual, expected, tolerance)
    difference = (actual.detach().to(expected.device).double() - expected.double()).abs()
    return Check(quantity, difference.max().item() if difference.numel() else 0.0, tolerance)


def equal(quantity: str, actual: Tensor, expected: Tensor) -> Check:
    """Number of unequal elements, e.g. of token indices."""
    if actual.shape != expected.shape:
        return _misshapen(quantity, actual, expected, 0.0, exact=True)
    return Check(quantity, float((actual.to(expected.device) != expected).sum().item()), 0.0, exact=True)


def relative(quantity: str, actual: Tensor | None, expected: Tensor, tolerance: float) -> Check:
    """L2 norm of the difference over the expected L2 norm; infinite if nothing was computed."""
    if actual is None:
        return Check(quantity, float("inf"), tolerance, reason="nothing was computed")
    if actual.shape != expected.shape:
        return _misshapen(quantity, actual, expected, tolerance)
    scale = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return Check(quantity, ((actual.double() - expected.double()).norm() / scale).item(), tolerance)


def _misshapen(
    quantity: str, actual: Tensor, expected: Tensor, tolerance: float, exact: bool = False
) -> Check:
    reason = f"has shape {list(expected.shape)} in the folder, {list(actual.shape)} here"
    return Check(quantity, float("inf"), tolerance, exact, reason)


class Settings(dict[str, Any]):
    """A part of meta.json, or of another `file`; asking for a setting that is not there raises AbsentError with its
    path."""

    def __init__(self, content: Mapping[str, Any], path: str = "", file: str = META) -> None:
        self.path, self.file = path, file
        super().__init__({key: _settings(value, self.name(key), file) for key, value in content.items()})

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def __missing__(self, key: str) -> Any:
        raise AbsentError(f"{self.file}: {self.name(key)}")


def _settings(value: Any, path: str, file: str) -> Any:
    if isinstance(value, Mapping):
        return Settings(value, path, file)
    if isinstance(value, list):
        return [_settings(item, f"{path}.{i}", file) for i, item in enumerate(value)]
    return value


def scales_of(meta: Settings) -> list[int]:
    """The pyramid. Raises ValueError for one that no golden set has."""
    scales = list(meta["patch_nums"])
    if not all(type(side) is int and side > 0 for side in scales) or sum(s * s for s in scales) > TOKENS:
        raise ValueError(f"patch_nums={scales} must be positive integers with at most {TOKENS} tokens")
    return scales


@dataclass
class Golden:
    """A folder and what its comparison has given so far.

    meta: the settings, usually of meta.json. absent: keys by file, that one included. blocked: "part: what it lacks".
    unknown: tensors by file that nothing was compared with, because this version does not know them or because their
    part is blocked.
    """

    folder: Path
    meta: Settings
    checks: list[Check] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    _weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _opened: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: str | Path, meta: Mapping[str, Any] | None = None) -> "Golden":
        """meta: instead of the folder's meta.json. Raises UserError for a folder without one or a golden.json."""
        folder = Path(folder)
        if meta is not None:
            return cls(folder, Settings(meta))
        for file in (META, NUMBERS):
            if (folder / file).exists():
                return cls(folder, Settings(read_json_object(folder / file), file=file))
        raise UserError(
            f"{folder} holds no {META} and no {NUMBERS}; give a folder of golden tensors or numbers"
        )

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def unread(self) -> list[str]:
        """Files of tensors that no part of meta.json speaks of."""
        return sorted(
            path.name for path in self.folder.glob("*.safetensors") if path.name not in self._opened
        )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What lacks an input is noted as blocked; what cannot be computed from what is there is a failed check."""
        try:
            yield
        except AbsentError as error:
            self.blocked.append(f"{name} needs {error}")
        except _COMPUTING as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.checks.append(Check(name, float("inf"), 0.0, reason=f"cannot be computed: {reason}"))

    def add(self, *checks: Check) -> None:
        self.checks.extend(checks)

    def leave_out(self, file: str, key: str) -> None:
        keys = self.absent.setdefault(file, [])
        if key not in keys:
            keys.append(key)

    def wanted(self, settings: Settings, key: str) -> Any:
        """An expectation among the settings; None if it is left out, which is noted."""
        if key not in settings:
            self.leave_out(settings.file, settings.name(key))
        return settings.get(key)

    def tensors(self, file: str, prefix: str, raw: bool = False) -> "TensorFile":
        """A file's tensors. prefix: of the quantities' names. raw: as stored; otherwise float16 becomes float32."""
        return TensorFile(self, file, prefix, self.read(file, raw))

    def read(self, file: str, raw: bool = False) -> dict[str, Tensor]:
        """Tensors of a file, {} without it; float16 storage becomes float32, integers stay."""
        self._opened.add(file)
        try:
            content = load_file(check_regular(self.folder / file))
        except FileNotFoundError:
            self.absent.setdefault(file, [])
            return {}
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.folder / file} is not a readable safetensors file ({reason}); copy it again"
            ) from error
        return {k: v if raw or not v.is_floating_point() else v.float() for k, v in content.items()}

    def weights(self, file: str) -> dict[str, Tensor]:
        """A state dict, read once. Raises AbsentError without the file."""
        if file not in self._weights:
            self._weights[file] = self.read(file)
        if not self._weights[file]:
            raise AbsentError(file)
        return self._weights[file]

    def listed(self, file: str) -> list[str]:
        """What the folder's own inventory.json, if it has one, says that a file holds."""
        inventory = read_json_object(self.folder / INVENTORY) if (self.folder / INVENTORY).exists() else {}
        content = inventory.get(file)
        return list(content) if isinstance(content, dict) else []


def fill_from(model: nn.Module, weights: Mapping[str, Tensor], file: str) -> None:
    """Load a state dict. Raises AbsentError for missing tensors, ValueError for shapes that do not fit."""
    expected = model.state_dict()
    if missing := [key for key in expected if key not in weights]:
        raise AbsentError(f"{file}: {', '.join(missing)}")
    known = {key: weights[key] for key in expected}
    if problems := mismatches(expected, known):
        raise ValueError(f"{file}: {'; '.join(problems)}")
    model.load_state_dict(known)


@dataclass
class TensorFile:
    """Golden tensors of one file, compared by key. Used keys are noted, so that what is left can be named."""

    golden: Golden
    file: str
    prefix: str
    content: dict[str, Tensor]
    used: set[str] = field(default_factory=set)

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def __getitem__(self, key: str) -> Tensor:
        """An input. Raises AbsentError."""
        self.used.add(key)
        if key not in self.content:
            raise AbsentError(f"{self.file}: {key}")
        return self.content[key]

    def starting(self, prefix: str) -> list[str]:
        return sorted(key for key in self.content if key.startswith(prefix))

    def wanted(self, key: str, optional: bool = False) -> Tensor | None:
        """An expected output; None if it is left out, which is noted unless it is optional."""
        self.used.add(key)
        if key not in self.content and not optional:
            self.golden.leave_out(self.file, key)
        return self.content.get(key)

    def close(self, key: str, actual: Tensor, tolerance: float, optional: bool = False) -> None:
        if (expected := self.wanted(key, optional)) is not None:
            self.golden.add(close(f"{self.prefix}{key}", actual, expected, tolerance))

    def equal(self, key: str, actual: Tensor, optional: bool = False) -> None:
        if (expected := self.wanted(key, optional)) is not None:
            self.golden.add(equal(f"{self.prefix}{key}", actual, expected))

    def relative(self, key: str, actual: Tensor | None, tolerance: float) -> None:
        if (expected := self.wanted(key)) is not None:
            self.golden.add(relative(f"{self.prefix}{key}", actual, expected, tolerance))

    def finish(self, within: str = "") -> None:
        """Note what is listed but absent, and what is there but was compared with nothing. within: of keys that start
        so."""
        for key in self.golden.listed(self.file):
            if key.startswith(within) and key not in self.content:
                self.golden.leave_out(self.file, key)
        left = [key for key in self.content if key.startswith(within) and key not in self.used]
        if left:
            self.golden.unknown.setdefault(self.file, []).extend(left)


def gradient_norms(
    golden: Golden, prefix: str, model: nn.Module, expected: Settings | None, tolerance: float
) -> None:
    """L2 norms of the gradients of all parameters; null: the parameter receives none.

    Relative to the norm itself, but not below 1e-4 of the largest one: in front of a normalization some gradients are
    zero but for rounding.
    """
    if expected is None:
        return
    actual = {name: None if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()}
    floor = 1e-4 * max(norm for norm in (*expected.values(), *actual.values()) if norm is not None)
    for key in sorted(expected.keys() | actual.keys()):
        if key not in expected:
            golden.leave_out(META, expected.name(key))
            continue
        norm, wanted = actual.get(key), expected[key]
        if (norm is None) != (wanted is None):
            deviation = float("inf")
        else:
            deviation = abs((norm or 0.0) - (wanted or 0.0)) / max(wanted or 0.0, floor)
        golden.add(Check(f"{prefix}grad_l2.{key}", deviation, tolerance))
