"""Arguments of the pipeline's call: checked, spread over the images, and renamed from diffusers' names."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch

from switti import arguments
from switti.config_values import from_values
from switti.errors import UserError
from switti.sampling.config import FOREIGN, PruningConfig, SamplingConfig
from switti.suggestions import did_you_mean, shortened

Seed = int | torch.Generator
MAX_CROP = 1 << 24  # px; the condition is computed in float32
# Diffusers' names of arguments that have another name here.
ALIASES = {"prompt": "prompts", "guidance_scale": "guidance"}


def rename_aliases(given: dict[str, Any], prompts: Any) -> tuple[Any, dict[str, Any]]:
    """(prompts, other arguments) under this pipeline's own names. UserError if one is given under both."""
    renamed = dict(given) if prompts is None else given | {"prompts": prompts}
    for alias, name in ALIASES.items():
        if alias not in renamed:
            continue
        if name in renamed:
            raise UserError(f"{alias} and {name} are the same argument; give one of them")
        renamed[name] = renamed.pop(alias)
    return renamed.pop("prompts", None), renamed


def check_texts(name: str, given: Any) -> list[str]:
    """One text or several as a list. Raises UserError for anything else."""
    if isinstance(given, str):
        return [arguments.text(name, given)]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise UserError(f"{name} must be a text or a list of texts, not {type(given).__name__}")
    return [arguments.text(f"{name}[{i}]", item) for i, item in enumerate(given)]


def one_each(given: str | Sequence[str], count: int, repeats: int, name: str) -> list[str]:
    """One text per image, from one for all or one per prompt."""
    texts = check_texts(name, given)
    if isinstance(given, str):
        texts = texts * count
    if len(texts) != count:
        raise UserError(f"{name}: {len(texts)} texts for {count} prompts; give one for all or one per prompt")
    return [text for text in texts for _ in range(repeats)]


def check_crop(crop: Any) -> list[list[int]]:
    """(height, width, top, left) in pixels as a row. Raises UserError."""
    if not isinstance(crop, Sequence) or isinstance(crop, str) or len(crop) != 4:
        raise UserError(f"crop={shortened(repr(crop))} must be (height, width, top, left) in pixels")
    return [[arguments.integer("crop", side, 0, MAX_CROP) for side in crop]]


def random_sources(
    seeds: Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[Seed]:
    """A seed or a generator per image."""
    if generator is None:
        sources: list[Seed] = list(range(count)) if seeds is None else _check_seeds(seeds)
        name = "seeds"
    elif seeds is not None:
        raise UserError("give seeds or generator, not both")
    else:
        single = isinstance(generator, torch.Generator)
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, Sequence) or not all(
            isinstance(g, torch.Generator) for g in generators
        ):
            raise UserError(
                f"generator={shortened(repr(generator))} must be a torch.Generator or a list of them"
            )
        for item in generators:
            if item.device.type != "cpu":
                raise UserError(
                    f"generator lives on {item.device}; noise is drawn on the CPU: torch.Generator()"
                )
        drawn = torch.randint(2**63 - 1, (count,), generator=generators[0]).tolist() if single else []
        sources, name = drawn if single else list(generators), "generators"
    if len(sources) != count:
        raise UserError(f"{len(sources)} {name} for {count} images; give one per image")
    return sources


def _check_seeds(seeds: Any) -> list[Seed]:
    if isinstance(seeds, str | bytes) or not hasattr(seeds, "__iter__"):
        raise UserError(f"seeds={shortened(repr(seeds))} must be a list with one seed per image")
    return [arguments.seed(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]


def change_settings(
    sampling: SamplingConfig, changes: dict[str, Any], others: Collection[str] = ()
) -> SamplingConfig:
    """Settings with some fields replaced; others: arguments of the caller that may have been meant.

    Of the group `pruning` a mapping changes single fields, a PruningConfig all of them, and None switches it off.
    Raises UserError for a name that is not a setting, a value of another type or out of range.
    """
    names = [item.name for item in fields(SamplingConfig)]
    for name in changes:
        if name not in names:
            nested = [f"pruning.{item.name}" for item in fields(PruningConfig)]
            hint = (
                did_you_mean(name, [*names, *others, *nested], FOREIGN)
                or f"; sampling has {', '.join(names)}"
            )
            raise UserError(f"unknown argument {name!r}{hint}")
    if not isinstance(sampling, SamplingConfig):
        raise UserError(f"sampling={shortened(repr(sampling))} must be a SamplingConfig")
    plain = asdict(sampling)
    for name, value in changes.items():
        plain[name] = _merged(plain[name], value)
    return from_values(SamplingConfig, {name: _plain(value) for name, value in plain.items()}, "sampling")


def _merged(before: Any, value: Any) -> Any:
    """A new value; of a group of settings, those that it does not name stay."""
    if not isinstance(before, dict):
        return value
    if isinstance(value, Mapping):
        return before | dict(value)
    return {} if value is None else asdict(value) if isinstance(value, PruningConfig) else value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
