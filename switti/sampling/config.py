"""Settings of the sampler (Section 3.5 and the released pipeline). Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from switti.config_values import FRACTION, NOT_NEGATIVE, check
from switti.errors import UserError
from switti.suggestions import shortened

_ONE_STEP_A_SCALE = (
    "an image takes one step per scale, so that the number of steps follows from the model's scales"
)
_SIZE = "the size of images follows from the model's finest scale"
_KEPT = "pruning.keep is the fraction of the tokens that is computed, the rest is pruned"
# Names in diffusers' pipelines and in the published implementation → the name here, or a sentence where there is no
# such setting.
FOREIGN: dict[str, str] = {
    **dict.fromkeys(("guidance_scale", "cfg_scale", "cfg", "guidance_weight", "cfg_strength"), "guidance"),
    **dict.fromkeys(
        ("cfg_list", "cfg_schedule", "guidance_schedule", "guidance_scales"), "guidance_by_scale"
    ),
    **dict.fromkeys(("turn_on_cfg_start_si", "cfg_start", "guidance_start_scale"), "guidance_start"),
    **dict.fromkeys(("turn_off_cfg_start_si", "cfg_stop", "guidance_end", "cfg_end"), "guidance_stop"),
    **dict.fromkeys(("last_scale_temp", "temperature"), "late_temperature"),
    **dict.fromkeys(("more_smooth", "smooth", "gumbel_softmax"), "gumbel"),
    **dict.fromkeys(("smooth_start_si", "smooth_start", "gumbel_start_scale"), "gumbel_start"),
    **dict.fromkeys(("topk",), "top_k"),
    **dict.fromkeys(("topp", "nucleus"), "top_p"),
    **dict.fromkeys(
        ("prune_scale_list", "prune_scales", "pruned_scales", "pruning_scales"), "pruning.scales"
    ),
    **dict.fromkeys(("keep_ratio", "pruning_keep", "keep_rate"), "pruning.keep"),
    **dict.fromkeys(("prune_ratio", "pruning_ratio", "drop_ratio"), _KEPT),
    **dict.fromkeys(
        ("num_inference_steps", "inference_steps", "sampling_steps", "denoising_steps"), _ONE_STEP_A_SCALE
    ),
    **dict.fromkeys(("height", "target_size", "original_size"), _SIZE),
}

# Beyond these, float32 logits of any trained model overflow or become equal.
LARGEST_GUIDANCE = 1e6
TEMPERATURES = (1e-6, 1e6)


@dataclass
class PruningConfig:
    """Token pruning at late scales, without training (FastVAR, arXiv 2503.23367)."""

    scales: list[int] | None = None
    """Scales at which each attention and feed-forward layer is computed only for the tokens that lie farthest from the
    map's mean; the others add what the layer added at the last scale in full, interpolated. Counted from 0, ascending,
    without 0. Null: none."""
    keep: list[float] = field(default_factory=lambda: [0.5])
    """Fraction of the tokens that is computed, in (0, 1]: one number for each of `scales`, or a single one for all.
    FastVAR: 0.6 and 0.5. 1: all, as without pruning."""
    from_block: int = 3
    """First block that is pruned, counted from 0; the blocks before it are computed in full. FastVAR: 3 of 32."""

    def validate(self, path: str) -> None:
        scales, keep = self.scales or [], self.keep
        shown = f"{path}.scales={shortened(scales)}"
        if scales and scales[0] == 0:
            raise UserError(
                f"{shown}: scale 0 has no scale before it to take outputs from; prune from scale 1 on"
            )
        if any(scale < 0 for scale in scales) or any(b <= a for a, b in pairwise(scales)):
            raise UserError(f"{shown} must be ascending scale numbers, counted from 0")
        for fraction in keep:
            if not 0.0 < fraction <= 1.0:
                raise UserError(f"{path}.keep={shortened(keep)} must lie in (0, 1]")
        if scales and len(keep) not in (1, len(scales)):
            raise UserError(
                f"{path}.keep={shortened(keep)} has {len(keep)} numbers, {shown} has {len(scales)}; "
                "give one for each scale, or one for all"
            )
        check(self, path, NOT_NEGATIVE, "from_block")

    def check_model(self, scales: int, depth: int, path: str) -> None:
        """UserError if a model of `scales` scales and `depth` blocks has not what is pruned."""
        if not self.scales:
            return
        if self.scales[-1] >= scales:
            raise UserError(
                f"{path}.scales={shortened(self.scales)}: the model has {scales} scales, 0 to {scales - 1}"
            )
        if self.from_block >= depth:
            raise UserError(
                f"{path}.from_block={self.from_block}: the model has {depth} blocks, 0 to {depth - 1}"
            )

    def counts(self, sizes: Sequence[int]) -> dict[int, int]:
        """Pruned scale → number of its tokens that are computed, where that is not all of them."""
        scales = self.scales or []
        fractions = self.keep * len(scales) if len(self.keep) == 1 else self.keep
        # Rounded, since 0.07 · 100 is a little more than 7.
        counts = {k: math.ceil(round(part * sizes[k], 6)) for k, part in zip(scales, fractions, strict=True)}
        return {scale: count for scale, count in counts.items() if count < sizes[scale]}


@dataclass
class SamplingConfig:
    """How logits become tokens. The N scales are counted from 0, and r = k / (N − 1) at scale k."""

    guidance: float = 4.0
    """Strength c of classifier-free guidance, which grows with the scale: (1 + c·r) · conditional − c·r ·
    unconditional logits. 0: none. The paper: 4 or 6 (Section 3.5)."""
    guidance_by_scale: list[float] | None = None
    """Factors of `guidance` at each scale instead of r, one number per scale: (1 + c·f) · conditional − c·f ·
    unconditional logits. 0: none at that scale. guidance=1 makes them the strengths themselves. Null: r."""
    guidance_start: int = 0
    """First scale with guidance."""
    guidance_stop: int | None = None
    """First scale without guidance again; the unconditional half is not computed from there on (Section 3.4). Null:
    guidance at all scales."""
    late_temperature: float | None = None
    """Divisor of the logits at the scales from guidance_stop on; the released pipeline has 0.1. Null: 1."""
    top_k: int = 400
    """Draw from the k most probable tokens only. 0: from all."""
    top_p: float = 0.95
    """Draw from the most probable tokens that together reach this probability, in [0, 1]. 0: no cut."""
    gumbel: bool = True
    """From scale gumbel_start to guidance_stop, mix codes by a Gumbel softmax instead of drawing one (Section 3.5)."""
    gumbel_start: int = 2
    """First scale with the Gumbel softmax."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """Token pruning at late scales, without training (FastVAR)."""

    def validate(self, path: str) -> None:
        limit, (low, high) = LARGEST_GUIDANCE, TEMPERATURES
        guidance = (lambda value: abs(value) <= limit, f"must lie in [-{limit:g}, {limit:g}]")
        check(self, path, guidance, "guidance")
        for factor in self.guidance_by_scale or []:
            if abs(self.guidance * factor) > limit:
                raise UserError(
                    f"{path}.guidance_by_scale={shortened(self.guidance_by_scale)} times {path}.guidance="
                    f"{self.guidance:g} must lie in [-{limit:g}, {limit:g}]"
                )
        check(self, path, (lambda value: value >= 0, "must be 0 (all) or positive"), "top_k")
        check(self, path, FRACTION, "top_p")
        words = f"must lie in [{low:g}, {high:g}], or be null for none"
        check(self, path, (lambda value: low <= value <= high, words), "late_temperature")
        check(self, path, NOT_NEGATIVE, "guidance_start", "guidance_stop", "gumbel_start")

    def check_model(self, scales: int, depth: int, path: str = "sampling") -> None:
        """UserError if settings do not fit a model of `scales` scales and `depth` blocks."""
        factors = self.guidance_by_scale
        if factors is not None and len(factors) != scales:
            raise UserError(
                f"{path}.guidance_by_scale={shortened(factors)} has {len(factors)} numbers; the model has {scales} "
                "scales"
            )
        self.pruning.check_model(scales, depth, f"{path}.pruning")
