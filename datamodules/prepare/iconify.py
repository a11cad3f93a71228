"""Emoji styles from Iconify's npm packages: `icons.json` (drawings by name) and `chars.json` (names by code point).

A package is a folder as `npm pack` and `tar -x` make it (`make emoji7-data` fetches five). Icons are joined with the
concepts of `datamodules.prepare.emoji` on their code points where the package states them, otherwise on their names:
those of the Python package `emoji`, their aliases, and those of the packages that state code points. Names are compared
by letters and digits only.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.prepare.captions import UnusableTextError, one_line
from datamodules.prepare.emoji import STYLES, EmojiItem, canonical_points, emoji_names
from switti.errors import UserError
from switti.files import kind_of, read_json_object
from switti.suggestions import shortened

# Package → the style's name in captions; others are called as their package. `noto-v1` draws Google's old blobs.
STYLE_NAMES = {"fluent-emoji-flat": "fluent", "noto-v1": "blob"}
ICONS, CHARS, INFO, PACKAGE = "icons.json", "chars.json", "info.json", "package.json"
# Published packages have 25 MB, 3 819 icons and 0.9 MB for the largest drawing.
MAX_ICONS_BYTES, MAX_SMALL_BYTES = 128 << 20, 4 << 20
MAX_ICONS = 20_000
MAX_BODY = 2 << 20
_STYLE = re.compile(r"[a-z0-9]{1,40}(-[a-z0-9]{1,40}){0,8}")
_POINTS = re.compile(r"[0-9a-f]{2,6}(-[0-9a-f]{2,6}){0,15}")
# Iconify's bodies are drawings alone. What reads other files or declares entities is refused.
_FOREIGN = re.compile(
    r"<!|<\?|<image\b|<foreignobject\b|<script\b|href\s*=\s*[\"'](?!#)|url\(\s*[\"']?(?!#)", re.I
)
_NOTICE = """# {title}

- Style in captions: `{style}`
- Author: {author} ({url})
- Licence: {licence} ({licence_url})
- Taken from the npm package `@iconify-json/{package}` {version}

Changes: rendered to pixels of the size given in `manifest.json`, transparency over white.
"""


@dataclass(frozen=True)
class IconPackage:
    """One Iconify package. icons: SVG documents by name, aliases included; points: code points → name, where stated."""

    name: str
    style: str
    version: str
    icons: Mapping[str, str]
    points: Mapping[str, str]
    info: Mapping[str, str]

    @property
    def notice_file(self) -> str:
        return f"ATTRIBUTION-{self.style}.md"

    @property
    def notice(self) -> str:
        """Author and licence of the style, as a file beside the shards."""
        return _NOTICE.format(style=self.style, package=self.name, version=self.version, **self.info)

    def record(self, count: int) -> dict[str, Any]:
        """The style's entry in the manifest."""
        return {
            "package": f"@iconify-json/{self.name}",
            "version": self.version,
            "licence": self.info["spdx"],
            "attribution": self.notice_file,
            "concepts": count,
        }


def read_package(folder: Path) -> IconPackage:
    """An unpacked npm package, given as its folder or the one above it.

    Raises:
        UserError: a file is missing or does not hold what Iconify's format asks for.
    """
    root = folder / "package" if kind_of(folder / "package") == "folder" else folder
    for name in (ICONS, INFO):
        if kind_of(root / name) != "file":
            raise UserError(
                f"--iconify {shortened(folder)}: no {name} there; unpack an @iconify-json package (make emoji7-data)"
            )
    content = read_json_object(root / ICONS, MAX_ICONS_BYTES)
    icons, prefix = content.get("icons"), content.get("prefix")
    if not isinstance(icons, dict) or not 0 < len(icons) <= MAX_ICONS:
        raise UserError(
            f"{root / ICONS} holds no object 'icons' of 1 to {MAX_ICONS} icons; it is not Iconify's"
        )
    if not isinstance(prefix, str) or not _STYLE.fullmatch(prefix):
        raise UserError(f"{root / ICONS}: 'prefix' is not a name such as noto-v1; it is not Iconify's")
    default = {side: content.get(side, 16) for side in ("width", "height")}
    drawings = {key: svg for key, icon in icons.items() if (svg := _document(icon, default)) is not None}
    drawings |= _aliases(content.get("aliases"), drawings)
    if not drawings:
        raise UserError(f"{root / ICONS}: no icon has a 'body' that is a drawing alone; it is not Iconify's")
    points = {}
    if kind_of(root / CHARS) is not None:
        for code, icon in read_json_object(root / CHARS, MAX_SMALL_BYTES).items():
            if _POINTS.fullmatch(code) and isinstance(icon, str) and icon in drawings:
                points[canonical_points(code)] = icon
    info = _facts(read_json_object(root / INFO, MAX_SMALL_BYTES))
    version = {}
    if kind_of(root / PACKAGE) is not None:
        version = read_json_object(root / PACKAGE, MAX_SMALL_BYTES)
    style = STYLE_NAMES.get(prefix, prefix)
    return IconPackage(prefix, style, _line(version.get("version"), ""), drawings, points, info)


def _document(icon: Any, default: Mapping[str, Any]) -> str | None:
    """The SVG around an icon's body; None for what is not an icon or not a drawing alone."""
    if not isinstance(icon, dict) or not isinstance(icon.get("body"), str):
        return None
    body = icon["body"]
    box = [icon.get(key, default.get(key, 0)) for key in ("left", "top", "width", "height")]
    if (
        not all(isinstance(n, int | float) and math.isfinite(n) and abs(n) < 1e5 for n in box)
        or min(box[2:]) <= 0
    ):
        return None
    if len(body) > MAX_BODY or _FOREIGN.search(body):
        return None
    view = " ".join(map(str, box))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{body}</svg>'


def _aliases(aliases: Any, drawings: Mapping[str, str]) -> dict[str, str]:
    """Other names of the same drawings. An alias that turns or mirrors its parent is another drawing: not taken."""
    if not isinstance(aliases, dict) or len(aliases) > MAX_ICONS:
        return {}
    plain = {
        alias: entry.get("parent")
        for alias, entry in aliases.items()
        if isinstance(entry, dict) and set(entry) <= {"parent", "hidden"}
    }
    return {
        alias: drawings[parent]
        for alias, parent in plain.items()
        if isinstance(parent, str) and parent in drawings and alias not in drawings
    }


def _facts(info: Mapping[str, Any]) -> dict[str, str]:
    """What the notice says, one line each."""
    author, licence = _object(info.get("author")), _object(info.get("license"))
    spdx = _line(licence.get("spdx"), "unknown")
    return {
        "title": _line(info.get("name"), "Icons"),
        "author": _line(author.get("name"), "its authors"),
        "url": _line(author.get("url"), "no address given"),
        "spdx": spdx,
        "licence": _line(licence.get("title"), spdx),
        "licence_url": _line(licence.get("url"), "no address given"),
    }


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _line(value: Any, default: str) -> str:
    try:
        return one_line(value)[0][:200] or default if isinstance(value, str) else default
    except UnusableTextError:
        return default


def styled_items(base: Sequence[EmojiItem], packages: Iterable[IconPackage]) -> list[EmojiItem]:
    """`base`, and its concepts drawn by each package that has them.

    Raises:
        UserError: two packages of one style, or one that shares no concept.
    """
    ordered = sorted(packages, key=lambda package: package.name)
    concepts = {item.points: item for item in base if item.style == STYLES[0]}
    known = _points_by_name(concepts, ordered)
    items, styles = list(base), set(STYLES)
    for package in ordered:
        if package.style in styles:
            raise UserError(f"--iconify: the style {package.style!r} is given twice; name each package once")
        styles.add(package.style)
        chosen = {points: name for points, name in package.points.items() if points in concepts}
        for name in package.icons:
            if (points := known.get(_letters(name))) is not None:
                chosen.setdefault(points, name)
        if not chosen:
            raise UserError(
                f"--iconify: the {len(package.icons)} icons of {package.name} have no name or code point in common "
                "with the emoji set; leave the package out"
            )
        items += [
            EmojiItem(
                points, package.style, package.icons[name], concepts[points].name, concepts[points].keywords,
                package.info["spdx"],
            )
            for points, name in chosen.items()
        ]  # fmt: skip
    return sorted(items, key=lambda item: (item.points, item.style))


def _points_by_name(concepts: Mapping[str, EmojiItem], packages: Iterable[IconPackage]) -> dict[str, str]:
    """Letters and digits of every known name → code points; full names before aliases, those before packages'."""
    known: dict[str, str] = {}
    named = [(points, names) for points, names in emoji_names().items() if points in concepts]
    for points, names in named:
        known.setdefault(_letters(names[0]), points)
    for points, names in named:
        for alias in names[1:]:
            known.setdefault(_letters(alias), points)
    for package in packages:
        for points, name in package.points.items():
            if points in concepts:
                known.setdefault(_letters(name), points)
    known.pop("", None)
    return known


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
