"""The templates and styles of pages. Nothing is loaded from anywhere: no script, no font, no network."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_ASSETS = Path(__file__).parent / "assets"
ENVIRONMENT = Environment(
    loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def style(*names: str) -> Markup:
    """These CSS files one after the other."""
    return Markup("".join((_ASSETS / name).read_text(encoding="utf-8") for name in names))
