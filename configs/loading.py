"""Composition of a run's settings from YAML files and `key=value` into a typed, checked RunConfig. Imports no torch.

A file holds only what differs from its base: `base: other.yaml` (or a list) names files relative to itself. It opens
with a comment: what it is, the command that runs it, its cost (measured, on what), what to expect.
Later sources win: defaults, bases in order, the file, the command line. `${tokenizer.scales}` refers to a setting.
"""

import copy
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.environment_resolver import environment
from configs.foreign_names import FOREIGN
from configs.schema import LINKS, RunConfig, get
from configs.settings import Setting, walk
from configs.yaml_values import is_64_bit, parse_yaml, read_yaml, text_of
from switti.environment import masked
from switti.errors import UserError, first_line
from switti.files import kind_of
from switti.run_folder import CONFIG, RECORD
from switti.run_folder import check_name as check_run_name
from switti.suggestions import did_you_mean, not_found, shortened

CONFIGS = Path(__file__).parent
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in walk(RunConfig)}
# The place of a run's folder, which does not affect what the run computes.
PLACE = ("name", "study", "runs_dir")
_GROUPS = {name.rpartition(".")[0] for name in SETTINGS} - {""}
_OTHER_BASES = re.compile(r"[+-]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+)")


def load(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Compose a run's settings.

    config: a path, or a name below configs/ such as `generator/demo`. overrides: `key=value`, values in YAML.
    Raises UserError for a missing file, an unknown name, a value of the wrong type or out of range.
    """
    path = find(config)
    changes = _parse_overrides(overrides)
    composed = _compose([*_chain(path, ()), changes], default_name=path.stem)
    composed.validate()
    if path.name == CONFIG and (path.parent / RECORD).exists():
        _place(composed, path.parent, {name for name, _, _ in changes})
    for setting in ("name", "study"):
        if (value := getattr(composed, setting)) is not None:
            check_run_name(value, setting)
    return composed


def from_run(run_dir: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings saved in a run folder's config.yaml; name, study and runs_dir are where the folder is now.

    A reference to an environment variable that is not set becomes `$NAME`; an error follows only where it is used.
    """
    path = Path(run_dir) / CONFIG
    if kind_of(path) is None:
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG}")
    changes = _parse_overrides(overrides)
    config = _compose([*_chain(path, ()), changes], default_name=Path(run_dir).name, lenient=True)
    config.validate()
    _place(config, Path(run_dir), {name for name, _, _ in changes})
    return config


def parse(overrides: Sequence[str]) -> dict[str, Any]:
    """Name → value of `key=value`, each checked by itself, for settings of which no config is at hand."""
    changes = _parse_overrides(overrides)
    composed = _compose([changes], default_name="")
    return {name: get(composed, name) for name, _, _ in changes}


def _place(config: RunConfig, folder: Path, given: set[str]) -> None:
    """Set name, study and runs_dir from the location of a run folder, except those that are `given`."""
    here = Path(os.path.abspath(folder))
    if Path(os.path.abspath(config.run_dir)) == here:
        return
    study = here.parent.name
    actual = {"name": here.name, "study": None if study == "single" else study, "runs_dir": here.parents[1]}
    for name, value in actual.items():
        if name not in given:
            setattr(config, name, None if value is None else str(value))


def to_yaml(config: RunConfig) -> str:
    """All settings in the form that `load` and `from_run` read; resolved, except references to the environment."""
    tree = OmegaConf.structured(config)
    for name, value in config.interpolated.items():
        OmegaConf.update(tree, name, value, merge=False)
    return OmegaConf.to_yaml(tree)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """All settings as plain containers, otherwise as in `to_yaml`."""
    content = asdict(config)
    for name, value in config.interpolated.items():
        *groups, last = name.split(".")
        reduce(lambda tree, group: tree[group], groups, content)[last] = value
    return content


def shown(config: RunConfig, name: str) -> Any:
    """The value of a setting as it may be saved and shown: with `${oc.env:…}` where it was given so."""
    return config.interpolated.get(name, get(config, name))


def find(config: str | Path, folder: Path = CONFIGS, kind: str = "config") -> Path:
    """The file that a path, or a name below `folder`, refers to; `.yaml` may be omitted. kind: its name in messages.

    A run folder refers to the settings that it was started with.
    """
    tried = [
        Path(config),
        Path(f"{config}.yaml"),
        folder / config,
        folder / f"{config}.yaml",
        Path(config, CONFIG),
    ]
    for path in tried:
        # Unlike Path.is_file, this is False for text that cannot be a file name.
        if os.path.isfile(path):
            return path
    raise UserError(
        not_found(kind, str(config).removesuffix(".yaml"), f"below {_shown(folder)}/", names_below(folder))
    )


def names_below(folder: Path) -> list[str]:
    """The configs in a folder, by the names that `find` takes."""
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _shown(folder: Path) -> str:
    """A folder of the checkout, relative to the checkout."""
    return str(folder.relative_to(CONFIGS.parent)) if folder.is_relative_to(CONFIGS.parent) else str(folder)


def _chain(path: Path, above: tuple[Path, ...]) -> Iterator[list[tuple[str, Any, str]]]:
    """Leaves of a file's bases, then its own, as (dotted name, value, source for messages)."""
    if path.resolve() in above:
        circle = " → ".join(item.name for item in (*above, path))
        raise UserError(f"{path} is its own base: {circle}")
    content = read_yaml(path)
    bases = content.pop("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        target = path.parent / str(base)
        if not target.is_file():
            raise UserError(f"{path}: no base file {target}")
        yield from _chain(target, (*above, path.resolve()))
    yield list(_leaves(content, "", f"{path}: "))


def _leaves(content: dict[Any, Any], prefix: str, source: str) -> Iterator[tuple[str, Any, str]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in _GROUPS and isinstance(value, dict):
            yield from _leaves(value, f"{name}.", source)
        elif name in _GROUPS:
            raise UserError(f"{source}{name}={_show(value)}: {name} is a group of settings, not one")
        else:
            yield check_name(name, source), value, source


def check_name(name: str, source: str = "") -> str:
    """`name` itself if there is such a setting, otherwise UserError with the nearest valid one."""
    if name in SETTINGS:
        return name
    hint = did_you_mean(name.lstrip("+~"), SETTINGS, FOREIGN)
    group = name.rpartition(".")[0]
    if group in SETTINGS:
        hint = f"; {group} is {SETTINGS[group].words}"
    elif not hint and group in _GROUPS:
        members = [other.removeprefix(f"{group}.") for other in SETTINGS if other.startswith(f"{group}.")]
        hint = f"; {group} has {', '.join(members)}"
    every = "; `python -m experiments.train CONFIG --show` prints all settings with their meaning"
    raise UserError(f"{source}unknown setting {shortened(name)!r}{hint or every}")


def _parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any, str]]:
    leaves = []
    for item in overrides:
        name, equals, text = item.partition("=")
        if item != item.encode("utf-8", "replace").decode():
            raise UserError(f"{shortened(item)!a} is not text in UTF-8")
        if not equals or not name or name.startswith("-") or name != name.strip():
            raise UserError(f"cannot read {shortened(item)!r}: settings are key=value, such as model.depth=4")
        if any(known.startswith(f"{name}.") for known in SETTINGS):
            raise UserError(f"{item}: {name} is a group of settings; set one of them, {name}.<setting>=value")
        leaves.append((check_name(name), _parse_value(text, SETTINGS[name], item), ""))
    return leaves


def _parse_value(text: str, setting: Setting, item: str) -> Any:
    try:
        value = parse_yaml(text)
    except ValueError:
        if setting.takes_text:
            return text
        raise UserError(_not_a(setting, text)) from None
    if type(value) is int and setting.kind in (int, float) and _OTHER_BASES.fullmatch(text.strip()):
        # In YAML, 010 is 8 and 1:30 is 90.
        raise UserError(f"{shortened(item)} would be {value}: write a decimal number without leading zeros")
    if setting.kind is str and value is not None and not isinstance(value, str):
        # `name=007` and `name=2e5` are names, not numbers.
        return text
    if value is None and not text and not setting.optional:
        if setting.takes_text:
            return ""
        raise UserError(
            f"{item} has no value: {setting.name} is {setting.words}, such as {_example(setting)}"
        )
    return value


def _example(setting: Setting) -> str:
    """The setting with its default value."""
    return f"{setting.name}={text_of(get(RunConfig(), setting.name))}"


def _not_a(setting: Setting, value: Any) -> str:
    """The message about a value of the wrong kind."""
    return f"{setting.name}={shortened(_show(value))} is not {setting.words}{_meant(setting, value)}"


def _meant(setting: Setting, value: Any) -> str:
    """The likely intention behind it, as the end of the message."""
    several = value if isinstance(value, list) else str(value).split(",")
    if setting.kind in (int, float, bool) and len(several) > 1:
        values = ", ".join(str(part).strip() for part in several)
        return f"; for a run of each: experiments.sweep base=… vary.{setting.name}=[{shortened(values)}]"
    if setting.kind is int and isinstance(value, float) and value.is_integer() and is_64_bit(value):
        return f"; write {int(value)}"
    if setting.kind is int and str(value).lstrip("+-").isdigit():
        return " of 64 bits"
    if setting.kind in (int, float) and not setting.optional:
        return f", such as {_example(setting)}"
    return did_you_mean(str(value), setting.choices)


@cache
def _defaults() -> DictConfig:
    """The settings before any file. Copy them: building them takes five times as long."""
    tree: DictConfig = OmegaConf.structured(RunConfig)
    for name, link in LINKS.items():
        OmegaConf.update(tree, name, link, merge=False)
    return tree


def _compose(
    sources: list[list[tuple[str, Any, str]]], default_name: str, lenient: bool = False
) -> RunConfig:
    tree = copy.deepcopy(_defaults())
    for name, value, source in (leaf for leaves in sources for leaf in leaves):
        try:
            OmegaConf.update(tree, name, value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(source + _not_a(SETTINGS[name], value)) from error
    with environment.lenient_if(lenient):
        kept = _resolve(tree)
        config = cast(RunConfig, OmegaConf.to_object(tree))
    config.interpolated = {name: value for name, value in kept.items() if name not in PLACE}
    config.name = config.name or default_name
    _validate(config, "")
    return config


def _resolve(tree: DictConfig) -> dict[str, Any]:
    """Resolve every interpolation, so that a wrong one is reported under the name of its setting.

    Returns the settings that depend on the environment, each as it was given.
    """
    kept, given = {}, OmegaConf.to_container(tree, resolve=False)
    for setting in SETTINGS.values():
        environment.begin()
        raw = reduce(lambda tree, part: tree[part], setting.name.split("."), cast(Any, given))
        try:
            if isinstance(raw, list) and setting.takes_text and "${" in str(raw):
                # OmegaConf resolves the entries of a list only if the setting is not a union of types.
                values = OmegaConf.select(cast(Any, OmegaConf.create(given)), setting.name)
                OmegaConf.update(tree, setting.name, list(values), merge=False)
            value = OmegaConf.select(tree, setting.name)
            numbers = list(value) if OmegaConf.is_list(value) else [value]
        except OmegaConfBaseException as error:
            if environment.missing:
                missing = f"the environment variable {environment.missing[0]} is not set"
                raise UserError(f"{setting.name}={shortened(_show(raw))}: {missing}") from error
            reason = masked(first_line(error))
            raise UserError(f"{setting.name} cannot be resolved: {reason}") from error
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{setting.name}={_show(value)} is not a finite number")
        if environment.asked or "${" in str(value):
            kept[setting.name] = raw
    return kept


def _validate(config: Any, path: str) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            name = f"{path}{item.name}"
            _validate(value, f"{name}.")
            if hasattr(value, "validate"):
                value.validate(name)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
