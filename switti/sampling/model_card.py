"""Model card (README.md) of an exported pipeline: a YAML header for model hubs, settings, training, metrics, usage.

Texts may come from a run's settings, which anybody may have written: they are escaped for Markdown and YAML.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from switti.escape import markdown_code, markdown_text, printable

CARD, ATTRIBUTION, IMAGE = "README.md", "ATTRIBUTION.md", "samples.png"
_LONGEST = 300
_USAGE = """```python
from switti import SwittiPipeline

# this folder, or OWNER/NAME on a model hub
pipeline = SwittiPipeline.from_pretrained("path/to/this/folder")
images = pipeline(["a red heart"], num_images_per_prompt=4)
images[0].save("heart.png")
```"""


@dataclass(frozen=True)
class MetricValue:
    """A metric as the card shows it. convention: how it was measured and what it may be compared with."""

    title: str
    value: float
    convention: str


@dataclass(frozen=True)
class RunFacts:
    """What a training run adds to a model card; the default knows nothing.

    training, data: label → value. evaluated: how the metrics were measured, one sentence. samples: a grid of images.
    attribution: the licence text that came with the data.
    """

    name: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[MetricValue, ...] = ()
    evaluated: str = ""
    samples: Image.Image | None = None
    attribution: str = ""


def model_card(visibility: str, settings: Mapping[str, Mapping[str, Any]], facts: RunFacts) -> str:
    """The card as Markdown. settings: group → name → value, such as {"model": {"depth": 12}}."""
    variant = visibility.replace("_", "-")
    title = f"{facts.name or 'Switti'}: {variant} scale-wise text-to-image generator"
    lines = [
        *_header(variant, facts),
        f"# {markdown_text(_short(title))}",
        "",
        "A scale-wise transformer with its RQ-VAE tokenizer, after *Switti: Designing Scale-Wise Transformers for",
        f"Text-to-Image Synthesis* (arXiv 2412.01819), in its {variant} variant: a token attends to "
        f"{'its own and all coarser scales' if visibility == 'causal' else 'the tokens of its own scale only'}.",
        "",
    ]
    if facts.samples is not None:
        lines += [f"![Sampled images]({IMAGE})", ""]
    lines += ["## Use", "", _USAGE, ""]
    if facts.data:
        lines += ["## Data", "", *_table(("", ""), facts.data.items()), ""]
    lines += _licence(facts)
    if facts.training:
        lines += ["## Training", "", *_table(("", ""), facts.training.items()), ""]
    if facts.metrics:
        rows = ((m.title, f"{m.value:.5g}", m.convention) for m in facts.metrics)
        lines += ["## Metrics", "", markdown_text(_short(facts.evaluated), paragraph=True), ""]
        lines += [*_table(("metric", "value", "convention"), rows), ""]
    rows_of_settings = (
        (f"{group}.{name}", value) for group in settings for name, value in settings[group].items()
    )
    lines += ["## Settings", "", *_table(("setting", "value"), rows_of_settings)]
    return "\n".join(lines) + "\n"


def _header(variant: str, facts: RunFacts) -> list[str]:
    """YAML between dashes. Values are written as JSON strings, which YAML reads as text whatever they hold."""
    tags = ["switti", "text-to-image", "scale-wise-transformer", "next-scale-prediction", variant]
    lines = ["---", "library_name: switti", "pipeline_tag: text-to-image"]
    if facts.attribution:
        lines += [
            "license: other",
            "license_name: licence-of-the-training-data",
            f"license_link: {ATTRIBUTION}",
        ]
    else:
        lines.append("license: unknown")
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]


def _licence(facts: RunFacts) -> list[str]:
    known = f"The data came with the attribution and licences in [{ATTRIBUTION}]({ATTRIBUTION})."
    unknown = (
        "The licence of the training data is not recorded; set `license` above before publishing the weights."
    )
    return ["## Licence", "", known if facts.attribution else unknown, ""]


def _table(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """Names and conventions as text, values as code."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, value, *rest in rows:
        cells = [markdown_text(_short(name)), _cell(value), *(markdown_text(_short(text)) for text in rest)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: Any) -> str:
    text = _without_folder(value) if isinstance(value, str) else json.dumps(value)
    # A bar ends a table's cell even within code.
    return markdown_code(_short(text)).replace("|", r"\|")


def _without_folder(text: str) -> str:
    """A path of the exporting machine as its last part, which is all that others need to see."""
    return f"…/{text.rstrip('/').rpartition('/')[2]}" if text.startswith(("/", "~/")) else text


def _short(text: str) -> str:
    line = printable(text)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
