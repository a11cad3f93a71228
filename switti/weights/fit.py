"""Fit, the third of the four steps of loading: the settings asked for against what weights are, and tables converted.

Almost no weight depends on the pyramid. Two tables do, and are carried from one pyramid to another here: a generator's
level embedding and a tokenizer's statistics of code use.

Shape suffixes: N scales, D width, V codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from switti.config_values import from_values
from switti.errors import UserError
from switti.models.config import GeneratorConfig
from switti.scales import PYRAMIDS, Pyramid
from switti.suggestions import printable
from switti.tokenizer.config import RQVAEConfig
from switti.weights.describe import Config, GeneratorDescription, TokenizerDescription
from switti.weights.published import HITS, Visibility
from switti.weights.read import CONFIG
from switti.weights.tokenizer_file import check_settings


def fit_generator(
    description: GeneratorDescription,
    config: GeneratorConfig | None = None,
    visibility: Visibility | None = None,
) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """(settings, weights under our keys). config, visibility: what is asked for; None takes the source's own.

    Raises UserError for a pyramid or variant that contradicts the buffers, or that nothing says.
    """
    source, masked, implied = description.contents.source, description.masked, description.implied
    wanted = asdict(config) if config is not None else description.stated
    # Shapes of the weights are compared key by key later; these two leave no trace in them.
    for name, buffered in (("visibility", masked), ("scales", implied.get("scales"))):
        settled = name == "visibility" and visibility is not None
        if buffered is not None and name in wanted and wanted[name] != buffered and not settled:
            raise UserError(
                f"{source}: model.{name}={wanted[name]} is asked for, but its buffers say {buffered}"
            )
    values = description.defaults | implied | ({"visibility": masked} if masked else {})
    values |= wanted | ({"visibility": visibility} if visibility else {})
    for name in ("visibility", "scales"):
        if values.get(name) is None:
            raise UserError(f"{source} does not say its model.{name}; give config= (or a {CONFIG} beside it)")
    return _checked(GeneratorConfig, values, "model", source), description.state


def fit_tokenizer(
    description: TokenizerDescription,
    config: RQVAEConfig | None = None,
    scales: Sequence[int] | None = None,
) -> tuple[RQVAEConfig, dict[str, Tensor]]:
    """(settings, weights for its pyramid). config, scales: what is asked for; None takes the source's own.

    Raises UserError for settings that contradict the file or the shapes, and for a pyramid that nothing says.
    """
    contents, implied = description.contents, description.implied
    source = contents.source
    if config is not None:
        check_settings(config, contents.metadata, contents.path, other_scales=scales is not None)
    else:
        stated = description.stated
        wrong = [
            f"{name}={printable(stated[name])} (the weights: {printable(implied[name])})"
            for name in implied
            if stated.get(name, implied[name]) != implied[name]
        ]
        if wrong:
            raise UserError(f"{source}: its settings are not those of its weights: {', '.join(wrong)}")
        values = implied | stated
        if "scales" not in values and contents.release is not None:
            values["scales"] = PYRAMIDS[contents.release.resolution]
        if "scales" not in values and scales is None:
            raise UserError(f"{source} does not say its tokenizer.scales; give scales= or config=")
        config = _checked(RQVAEConfig, {"scales": list(scales or [])} | values, "tokenizer", source)
    if scales is not None:
        config = replace(config, scales=list(scales))
    return config, resize_code_use(contents.tensors, config.scales)


def _checked(kind: type[Config], values: Mapping[str, Any], path: str, source: str) -> Config:
    """A config object; values of a wrong type or range are UserErrors that name the source."""
    try:
        return from_values(kind, values, path)
    except UserError as error:
        raise UserError(f"{source}: its {CONFIG} does not make a {path}: {error}") from error


# ---- from one pyramid to another --------------------------------------------------------------------------------


def resize_code_use(state: Mapping[str, Tensor], scales: Sequence[int]) -> dict[str, Tensor]:
    """A tokenizer's weights for a pyramid.

    The statistics of how often codes were chosen [N, V] are kept when they count N scales, and start from zero
    otherwise.
    """
    hits = state.get(HITS)
    if hits is None or len(hits) != len(scales):
        hits = torch.zeros(len(scales), state["quantize.embedding.weight"].shape[0])
    return {**state, HITS: hits}


def nearest_levels(old_scales: Sequence[int], new_scales: Sequence[int]) -> list[int]:
    """For each new scale the old one at the nearest progress r = k / (N − 1); the coarser one on ties."""
    old, new = Pyramid(tuple(old_scales)).count, Pyramid(tuple(new_scales)).count
    # In integers, because floating point would break ties by rounding.
    return [min(range(old), key=lambda j: abs(j * (new - 1) - k * (old - 1))) for k in range(new)]


def resize_levels(
    state: Mapping[str, Tensor], old_scales: Sequence[int], new_scales: Sequence[int]
) -> dict[str, Tensor]:
    """A generator's weights for another pyramid, as when training continues at a higher resolution.

    The rotary embedding is normalized, so nothing else depends on the scales. Each row of the level embedding
    [N, D] is taken from the scale at the nearest progress r = k / (N − 1): coarsest to coarsest, finest to finest, and
    pyramids of equal length (256 and 512 px) keep every row. Raises UserError for learned absolute positions and for
    another side of the first scale, which cannot be carried over.
    """
    if list(old_scales) == list(new_scales):
        return dict(state)
    if "pos_1LC" in state:
        raise UserError(
            f"model.rope=false: learned positions of scales {list(old_scales)} do not fit {list(new_scales)}; "
            "only weights with rotary embedding change resolution"
        )
    if old_scales[0] != new_scales[0]:
        raise UserError(
            f"model.scales={list(new_scales)} must begin with {old_scales[0]} as the given weights do"
        )
    rows_N = torch.tensor(nearest_levels(old_scales, new_scales))
    return {**state, "lvl_embed.weight": state["lvl_embed.weight"][rows_N]}
