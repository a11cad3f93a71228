"""Paths, globs and brace ranges to shards, and short names for them."""

import os
import re
from glob import escape, glob, has_magic
from pathlib import Path

from braceexpand import braceexpand

from switti.errors import UserError

# Of a validation split's shards, as experiments.prepare names them: validation-pairs-000000.tar.
_SPLIT = re.compile(r"validation-([a-z][a-z0-9_]{0,39})-\d+")


def split_of(path: Path) -> str:
    """The name of the validation split that a shard belongs to, "" for shards without one (validation-000000.tar)."""
    match = _SPLIT.fullmatch(path.stem)
    return match[1] if match else ""


def expand(setting: str, patterns: list[str], must_exist: bool = True) -> list[Path]:
    """Paths, globs and brace ranges → shards, sorted, each once. What exists as it is written is taken as it is.

    Raises:
        UserError: nothing matches, or, with must_exist, a named shard does not. `setting` is named: 'data.train'.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        for path in _matches(setting, pattern):
            if os.path.isdir(path):
                raise UserError(
                    f"{setting}={str(path)!r} is a folder; name its shards, e.g. {path}/train-*.tar"
                )
            if must_exist and not os.path.isfile(path):
                raise UserError(f"{setting}: no shard {path}")
            found[path] = None
    return list(found)


def _matches(setting: str, pattern: str) -> list[Path]:
    if "\0" in pattern:
        raise UserError(f"{setting}={pattern!r} is not a path")
    folder, rest = _existing_part(os.path.expanduser(pattern))
    if not rest:
        return [Path(folder)]
    try:
        names = sorted(braceexpand(rest, escape=False))
    except ValueError as error:
        raise UserError(f"{setting}={pattern!r} is not a valid brace range: {error}") from error
    found: list[Path] = []
    for name in names:
        written = os.path.join(folder, name)
        globbed = has_magic(name) and not os.path.lexists(written)
        paths = sorted(glob(os.path.join(escape(folder), name), recursive=True)) if globbed else [written]
        if not paths:
            meaning = "; in a name that does not exist, [ ], * and ? stand for other characters"
            raise UserError(
                f"{setting}={written!r} matches no shard{meaning if globbed else ''}; see "
                "`python -m experiments.prepare --help`"
            )
        found += map(Path, paths)
    return found


def _existing_part(pattern: str) -> tuple[str, str]:
    """(the longest beginning that exists as it is written, what is left to be expanded)."""
    folder, parts = "", pattern.split("/")
    for number, part in enumerate(parts):
        longer = os.path.join(folder, part) if folder or part else "/" * (len(parts) > 1)
        if not os.path.exists(longer):
            return folder, "/".join(parts[number:])
        folder = longer
    return folder, ""


def unique_names(paths: list[Path]) -> list[str]:
    """The shards' stems; if two are equal, with as many folders before them as tell all apart."""
    absolute = [path.absolute().with_suffix("") for path in paths]
    for depth in range(1, max(len(p.parts) for p in absolute) + 1):
        names = ["/".join(p.parts[-depth:]) for p in absolute]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"shards differ in their endings only: {', '.join(map(str, paths))}")


def split_pattern(entry: str) -> str:
    """A folder's validation split if it has one, else all its shards; anything else as it is."""
    if not Path(entry).is_dir():
        return entry
    split = "validation-" if any(Path(entry).glob("validation-*.tar")) else ""
    return f"{entry}/{split}*.tar"
