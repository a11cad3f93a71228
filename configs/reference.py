"""Reference of all settings: type, default, value and meaning. Imports no torch."""

import json
import textwrap
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from configs.field_docs import setting_docs
from configs.loading import SETTINGS, shown
from configs.schema import LINKS, RunConfig, get
from switti.errors import UserError
from switti.suggestions import did_you_mean

# Settings that a task does not read.
UNUSED = {
    "generator": ("tokenizer_loss", "decoder"),
    "tokenizer": (
        "init_from",
        "tokenizer_weights",
        "model",
        "text",
        "loss",
        "decoder",
        "sampling",
        "metrics",
    ),
    "decoder": ("init_from", "model", "text", "loss", "tokenizer_loss", "sampling", "metrics"),
}
_COLUMNS = 100
# Of the list of groups in `--help`.
_WIDEST = 120


@cache
def docs() -> dict[str, str]:
    """Dotted name → meaning of every setting and every group of settings."""
    return dict(setting_docs(RunConfig))


def groups() -> dict[str, str]:
    """Group of settings → its meaning."""
    return {name: text for name, text in docs().items() if name not in SETTINGS}


def settings_of(group: str) -> list[str]:
    """Settings of a group; of "", those that are in none."""
    return [name for name in SETTINGS if name.rpartition(".")[0] == group]


def group_list() -> str:
    """A line for each group of settings, or two where it is long."""
    width = max(map(len, groups())) + 2
    indent = " " * (width + 2)
    lines = [
        line
        for name, text in groups().items()
        for line in textwrap.wrap(f"  {name:<{width}}{text}", _WIDEST, subsequent_indent=indent)
    ]
    single = ", ".join(settings_of(""))
    return "\n".join(["groups of settings:", *lines, *_wrapped(f"and {single}.", "  ")])


def default_of(name: str) -> Any:
    """The default value of a setting, or `${other}` where it follows another one."""
    return LINKS.get(name, get(_defaults(), name))


def is_default(config: RunConfig, name: str) -> bool:
    """Whether a setting has the value that it has without any file."""
    linked = LINKS.get(name)
    usual = get(config, linked[2:-1]) if linked else get(_defaults(), name)
    return name not in config.interpolated and get(config, name) == usual


def explain(config: RunConfig, name: str) -> str:
    """Type, default, current value and meaning of a setting, or of every setting of a group."""
    if name in SETTINGS:
        return "\n".join(_explained(config, name))
    if name not in groups():
        hint = did_you_mean(name, docs()) or f"; the groups are {', '.join(groups())}"
        raise UserError(f"--explain {name}: no such setting{hint}")
    members = [member for member in SETTINGS if member.startswith(f"{name}.")]
    parts = [_explained(config, member) for member in members]
    return "\n\n".join([docs()[name], *("\n".join(part) for part in parts)])


def _explained(config: RunConfig, name: str) -> list[str]:
    suffix = " (the default)" if is_default(config, name) else ""
    return [
        f"{name}: {SETTINGS[name].words}",
        *_wrapped(docs()[name], "  "),
        f"  default: {in_one_line(default_of(name))}",
        f"  value:   {in_one_line(shown(config, name))}{suffix}",
    ]


def annotated_yaml(config: RunConfig) -> str:
    """All settings that the run's task reads, as YAML that loads again, with their meaning as comments.

    A value other than the default has the default behind it. Settings of other tasks appear if they were changed.
    """
    lines: list[str] = []
    opened = {""}
    for group in ("", *groups()):
        names = [
            name for name in settings_of(group) if _is_used(config, name) or not is_default(config, name)
        ]
        if names:
            lines += _headings(group, opened)
        for name in names:
            lines += _annotated(config, name, "  " * name.count("."))
    return "\n".join(lines) + "\n"


def _headings(group: str, opened: set[str]) -> list[str]:
    """The group's line, after those of the groups around it where they have none yet."""
    if group in opened:
        return []
    opened.add(group)
    around, _, last = group.rpartition(".")
    indent = "  " * group.count(".")
    return [*_headings(around, opened), "", *_wrapped(docs()[group], f"{indent}# "), f"{indent}{last}:"]


def _annotated(config: RunConfig, name: str, indent: str) -> list[str]:
    unused = "" if _is_used(config, name) else f" (Not read by a {config.task} run.)"
    entry = f"{name.rpartition('.')[2]}: {in_one_line(shown(config, name))}"
    lines = [*_wrapped(docs()[name] + unused, f"{indent}# "), *textwrap.indent(entry, indent).split("\n")]
    if not is_default(config, name):
        lines[-1] += f"  # default: {in_one_line(default_of(name))}"
    return lines


def _is_used(config: RunConfig, name: str) -> bool:
    return name.partition(".")[0] not in UNUSED[config.task]


@cache
def _defaults() -> RunConfig:
    return RunConfig()


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def in_one_line(value: Any) -> str:
    """A value as YAML in one line; JSON lists are YAML."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    text = OmegaConf.to_yaml({"value": value}).removeprefix("value: ").rstrip("\n")
    return text if "\n" not in text else json.dumps(value, ensure_ascii=False)
