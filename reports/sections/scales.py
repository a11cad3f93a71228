"""Tables by scale: final validation loss against the tokens' entropy, and accuracy."""

from reports.data.comparability import scale_sides
from reports.data.comparison import Comparison
from reports.data.final_values import scale_numbers
from reports.data.study import Variant
from reports.render.document import Section, Table, Text
from reports.render.formatting import DASH, gap, in_one_row, interval, number, signed

_ENTROPY = (
    "The unigram entropy is the loss of a model that knows how often each token occurs at a scale and nothing else. "
    "A difference near 0 means that the model has learned nothing beyond that at this scale."
)


def scales_section(comparison: Comparison) -> Section:
    """For each token space a table of losses and one of accuracies, with paired differences."""
    section = Section("scales", "Each scale")
    for variants in comparison.loss_groups:
        if losses := _losses(comparison, variants):
            section.blocks.append(losses)
    if section.blocks:
        section.blocks.append(Text(_ENTROPY, "note"))
    else:
        section.blocks.append(Text("No validation loss by scale in any `metrics.csv`.", "missing"))
    for variants in comparison.loss_groups:
        if accuracies := _accuracies(comparison, variants):
            section.blocks.append(accuracies)
    return section


def _losses(comparison: Comparison, variants: tuple[Variant, ...]) -> Table | None:
    stem, rows = "validation/loss_by_scale", []
    for k in scale_numbers(variants, stem):
        level = comparison.unigram_entropy(variants, k)
        means = comparison.spreads(variants, f"{stem}/{k}")
        row = [*_scale(variants, k), number(level), *in_one_row(means)]
        row += [signed(mean.mean - level) if mean and level is not None else DASH for mean in means]
        rows.append((*row, *_differences(comparison, variants, f"{stem}/{k}")))
    header = ["scale", "tokens", "unigram entropy", *(variant.label for variant in variants)]
    header += [f"{variant.label} − entropy" for variant in variants]
    header += _difference_heads(comparison, variants)
    text = f"Final validation loss, nats a token.{_how_different(comparison, variants)}"
    return Table(tuple(header), tuple(rows), text) if rows else None


def _accuracies(comparison: Comparison, variants: tuple[Variant, ...]) -> Table | None:
    stem = "validation/accuracy_by_scale"
    rows = [
        (
            *_scale(variants, k),
            *in_one_row(comparison.spreads(variants, f"{stem}/{k}")),
            *_differences(comparison, variants, f"{stem}/{k}"),
        )
        for k in scale_numbers(variants, stem)
    ]
    header = ("scale", "tokens", *(v.label for v in variants), *_difference_heads(comparison, variants))
    text = "Final validation accuracy: share of tokens whose most probable guess is right."
    text += _how_different(comparison, variants)
    return Table(header, tuple(rows), text) if rows else None


def _scale(variants: tuple[Variant, ...], scale: int) -> tuple[str, str]:
    sides = scale_sides(variants[0].runs[0])
    return str(scale), f"{sides[scale]}×{sides[scale]}" if scale < len(sides) else DASH


def _others(comparison: Comparison, variants: tuple[Variant, ...]) -> list[Variant]:
    """Variants of a token space that can be subtracted: those that share it with the reference."""
    has_reference = any(variant.number == 0 for variant in variants)
    return [variant for variant in variants if variant.number > 0] if has_reference else []


def _difference_heads(comparison: Comparison, variants: tuple[Variant, ...]) -> list[str]:
    return [f"{variant.label}: difference" for variant in _others(comparison, variants)]


def _how_different(comparison: Comparison, variants: tuple[Variant, ...]) -> str:
    """End of a caption."""
    if not _others(comparison, variants):
        return ""
    return f" Differences are against {comparison.study.variants[0].label}, paired, with 95 % intervals."


def _differences(comparison: Comparison, variants: tuple[Variant, ...], name: str) -> list[str]:
    found = [comparison.difference(variant, name).paired for variant in _others(comparison, variants)]
    return [f"{gap(paired)} {interval(paired)}" if paired else DASH for paired in found]
