"""The table of an evaluation: terminal, Markdown and LaTeX, best three marked, published numbers beside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.statistics import Estimate
from switti.metrics.catalogue import MetricInfo
from switti.tables import aligned

# Table 2 of the paper: COCO 30K and MJHQ 30K.
_COLUMNS = ("pick_score_v1", "clip_score_vit_h_14", "image_reward", "fid_inception_pytorch_fid")
PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "coco": {
        "SDXL-Turbo": (0.229, 0.355, 0.83, 17.6),
        "DMD2": (0.231, 0.356, 0.87, 14.3),
        "SDXL": (0.226, 0.360, 0.77, 14.4),
        "SD3-medium": (0.227, 0.354, 1.01, 19.5),
        "Lumina-Next": (0.224, 0.329, 0.55, 18.4),
        "LlamaGen": (0.208, 0.274, -0.25, 44.8),
        "HART": (0.223, 0.341, 0.75, 20.9),
        "Switti (AR) 512": (0.227, 0.354, 0.91, 18.1),
        "Switti 512": (0.227, 0.356, 0.95, 17.6),
        "Switti 1024": (0.229, 0.355, 0.96, 18.2),
    },
    "mjhq": {
        "SDXL-Turbo": (0.216, 0.365, 0.84, 15.7),
        "DMD2": (0.219, 0.374, 0.87, 7.2),
        "SDXL": (0.217, 0.384, 0.78, 7.6),
        "SD3-medium": (0.215, 0.363, 0.91, 13.1),
        "Lumina-Next": (0.216, 0.353, 0.75, 5.9),
        "LlamaGen": (0.194, 0.288, -0.45, 26.9),
        "HART": (0.216, 0.366, 0.84, 5.8),
        "Switti (AR) 512": (0.217, 0.378, 0.88, 9.5),
        "Switti 512": (0.217, 0.381, 0.91, 9.5),
        "Switti 1024": (0.219, 0.378, 0.81, 8.1),
    },
}
_PROMPTS = 30_000
_MARKS = ("¹", "²", "³")
_LATEX = (r"\textbf{{{}}}", r"\underline{{{}}}", r"\textit{{{}}}")


@dataclass(frozen=True)
class Row:
    """A system: its own values, or published ones, which have no interval and are not ranked."""

    name: str
    values: dict[str, Estimate]
    differences: dict[str, Estimate]
    published: bool = False


def published_rows(prompts: Mapping[str, Any], labels: Sequence[str]) -> list[Row]:
    """The paper's systems, where it has measured one of the columns on these prompts by the same protocol."""
    shared = [label for label in labels if label in _COLUMNS]
    # A part of the prompts is another benchmark.
    if not shared or prompts["name"] not in PUBLISHED or prompts["count"] != _PROMPTS:
        return []
    rows = []
    for name, numbers in PUBLISHED[prompts["name"]].items():
        by_label = dict(zip(_COLUMNS, numbers, strict=True))
        values = {label: Estimate(by_label[label], None, None, _PROMPTS) for label in shared}
        rows.append(Row(f"{name} (paper)", values, {}, published=True))
    return rows


def ranks(rows: Sequence[Row], label: str, info: MetricInfo) -> dict[int, int]:
    """Row → 0, 1 or 2 for the best three values; published rows are not ranked, nor a single system."""
    if info.better is None:
        return {}
    sign = 1 if info.better == "lower" else -1
    own = [n for n, row in enumerate(rows) if not row.published and label in row.values]
    if len(own) < 2:
        return {}
    order = sorted(own, key=lambda n: sign * rows[n].values[label].value)
    return {n: place for place, n in enumerate(order[: len(_MARKS)])}


def _cells(
    rows: Sequence[Row], infos: dict[str, MetricInfo], mark: Callable[[str, int | None], str]
) -> list[list[str]]:
    """Header and a line a row; values with the half width of their interval."""
    labels = list(rows[0].values)
    places = {label: ranks(rows, label, infos[label]) for label in labels}
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}
    lines = [["system", *(f"{infos[label].title}{arrow[infos[label].better]}" for label in labels)]]
    for number, row in enumerate(rows):
        cells = [row.name]
        for label in labels:
            if label not in row.values:
                cells.append("–")
                continue
            cells.append(mark(show(row.values[label]), places[label].get(number)))
        lines.append(cells)
    return lines


def show(estimate: Estimate) -> str:
    """ "0.3560 ± 0.0004": half the width of the 95 % interval."""
    value = f"{estimate.value:.4f}" if abs(estimate.value) < 10 else f"{estimate.value:.2f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ± {(estimate.high - estimate.low) / 2:.4f}"


def terminal(rows: Sequence[Row], infos: dict[str, MetricInfo]) -> str:
    """Aligned text; ¹ ² ³ mark the best three."""
    return "\n".join(aligned(_cells(rows, infos, lambda text, place: text + _mark(place))))


def _mark(place: int | None) -> str:
    return " " if place is None else _MARKS[place]


def markdown(rows: Sequence[Row], infos: dict[str, MetricInfo], note: str) -> str:
    """A table, the differences, and what the columns are."""
    header, *lines = _cells(rows, infos, lambda text, place: text + _mark(place).strip())
    table = [_pipes(header), _pipes(["---", *["---:"] * (len(header) - 1)]), *map(_pipes, lines)]
    parts = [
        note,
        "",
        *table,
        "",
        "¹ ² ³: the best three. ±: half of the 95 % bootstrap interval over prompts.",
    ]
    compared = [row for row in rows if row.differences]
    if compared:
        labels = list(compared[0].differences)
        head = [f"minus {rows[0].name}, on the same prompts", *(infos[label].title for label in labels)]
        parts += ["", _pipes(head), _pipes(["---", *["---:"] * len(labels)])]
        parts += [
            _pipes([row.name, *(interval(row.differences[label]) for label in labels)]) for row in compared
        ]
    parts += ["", *(f"- {infos[label].title}: {infos[label].meaning}" for label in rows[0].values)]
    return "\n".join(parts) + "\n"


def interval(estimate: Estimate) -> str:
    """ "+0.0012 [−0.0003, +0.0027]"."""
    value = f"{estimate.value:+.4f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def latex(rows: Sequence[Row], infos: dict[str, MetricInfo]) -> str:
    """A tabular for booktabs; bold, underlined and italic are the best three, as first, second and third."""

    def mark(text: str, place: int | None) -> str:
        text = text.replace(" ± ", r"\,$\pm$\,")
        return text if place is None else _LATEX[place].format(text)

    header, *lines = _cells(rows, infos, mark)
    header = [cell.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$") for cell in header]
    body = [" & ".join([_escape(line[0]), *line[1:]]) + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}",
            r"\toprule",
            " & ".join(_escape(cell) if "$" not in cell else cell.replace("_", r"\_") for cell in header)
            + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


_SPECIAL = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
            "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
