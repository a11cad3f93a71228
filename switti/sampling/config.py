"""Settings of the sampler (Section 3.5 and the released pipeline). Imports no torch."""

from dataclasses import dataclass

from switti.config_values import FRACTION, NOT_NEGATIVE, check

_ONE_STEP_A_SCALE = (
    "an image takes one step per scale, so that the number of steps follows from the model's scales"
)
_SIZE = "the size of images follows from the model's finest scale"
# Names in diffusers' pipelines and in the published implementation → the name here, or a sentence where there is no
# such setting.
FOREIGN: dict[str, str] = {
    **dict.fromkeys(("guidance_scale", "cfg_scale", "cfg", "guidance_weight", "cfg_strength"), "guidance"),
    **dict.fromkeys(("turn_on_cfg_start_si", "cfg_start", "guidance_start_scale"), "guidance_start"),
    **dict.fromkeys(("turn_off_cfg_start_si", "cfg_stop", "guidance_end", "cfg_end"), "guidance_stop"),
    **dict.fromkeys(("last_scale_temp", "temperature"), "late_temperature"),
    **dict.fromkeys(("more_smooth", "smooth", "gumbel_softmax"), "gumbel"),
    **dict.fromkeys(("smooth_start_si", "smooth_start", "gumbel_start_scale"), "gumbel_start"),
    **dict.fromkeys(("topk",), "top_k"),
    **dict.fromkeys(("topp", "nucleus"), "top_p"),
    **dict.fromkeys(
        ("num_inference_steps", "inference_steps", "sampling_steps", "denoising_steps"), _ONE_STEP_A_SCALE
    ),
    **dict.fromkeys(("height", "target_size", "original_size"), _SIZE),
}

# Beyond these, float32 logits of any trained model overflow or become equal.
LARGEST_GUIDANCE = 1e6
TEMPERATURES = (1e-6, 1e6)


@dataclass
class SamplingConfig:
    """How logits become tokens. The N scales are counted from 0, and r = k / (N − 1) at scale k."""

    guidance: float = 4.0
    """Strength c of classifier-free guidance, which grows with the scale: (1 + c·r) · conditional − c·r ·
    unconditional logits. 0: none. The paper: 4 or 6 (Section 3.5)."""
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

    def validate(self, path: str) -> None:
        limit, (low, high) = LARGEST_GUIDANCE, TEMPERATURES
        guidance = (lambda value: abs(value) <= limit, f"must lie in [-{limit:g}, {limit:g}]")
        check(self, path, guidance, "guidance")
        check(self, path, (lambda value: value >= 0, "must be 0 (all) or positive"), "top_k")
        check(self, path, FRACTION, "top_p")
        words = f"must lie in [{low:g}, {high:g}], or be null for none"
        check(self, path, (lambda value: low <= value <= high, words), "late_temperature")
        check(self, path, NOT_NEGATIVE, "guidance_start", "guidance_stop", "gumbel_start")
