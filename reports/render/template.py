"""The page's templates and style. Nothing is loaded from anywhere: no script, no font, no network."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_ASSETS = Path(__file__).parent / "assets"
STYLE = (_ASSETS / "page.css").read_text(encoding="utf-8")
ENVIRONMENT = Environment(
    loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def page(
    title: str, lead: Markup, contents: Sequence[tuple[str, str]], sections: Markup, style: str = ""
) -> str:
    """A whole page. lead, sections: safe markup; contents: (anchor, heading); style: CSS besides the page's own."""
    return ENVIRONMENT.get_template("page.html.jinja").render(
        title=title, lead=lead, contents=contents, sections=sections, style=Markup(STYLE + style)
    )
