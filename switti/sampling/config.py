"""Settings of the sampler (Section 3.5 and the released pipeline). Imports no torch."""

from dataclasses import dataclass

from switti.errors import UserError

_ONE_STEP_A_SCALE = (
    "an image takes one step a scale, so that the number of steps follows from the model's scales"
)
_SIZE = "images have the size that belongs to the model's finest scale"
# What these settings are called in diffusers' pipelines and in the published implementation → the name here, or a
# sentence where there is no such setting.
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
    """How logits become tokens. N scales are counted from 0; r = k / (N - 1).

    guidance: strength c; at scale k logits are (1 + c·r)·conditional − c·r·unconditional.
    guidance_start, guidance_stop: first scale with guidance, first scale without it again (None: never stopped).
    late_temperature: divisor of the logits from guidance_stop on (released: 0.1; None: 1).
    top_k: keep that many largest logits (0: all). top_p: nucleus mass (0: no cut).
    gumbel, gumbel_start: from that scale on, while guidance is on, mix the codebook softly instead of a hard draw.
    """

    guidance: float = 4.0
    guidance_start: int = 0
    guidance_stop: int | None = None
    late_temperature: float | None = None
    top_k: int = 400
    top_p: float = 0.95
    gumbel: bool = True
    gumbel_start: int = 2

    def validate(self, path: str) -> None:
        if not abs(self.guidance) <= LARGEST_GUIDANCE:
            raise UserError(
                f"{path}.guidance={self.guidance} must lie in [-{LARGEST_GUIDANCE:g}, {LARGEST_GUIDANCE:g}]"
            )
        if self.top_k < 0:
            raise UserError(f"{path}.top_k={self.top_k} must be 0 (all) or positive")
        if not 0.0 <= self.top_p <= 1.0:
            raise UserError(f"{path}.top_p={self.top_p} must lie in [0, 1]")
        low, high = TEMPERATURES
        if self.late_temperature is not None and not low <= self.late_temperature <= high:
            raise UserError(
                f"{path}.late_temperature={self.late_temperature} must lie in [{low:g}, {high:g}], or be null for none"
            )
        for name in ("guidance_start", "gumbel_start"):
            if getattr(self, name) < 0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must not be negative")
        if self.guidance_stop is not None and self.guidance_stop < 0:
            raise UserError(f"{path}.guidance_stop={self.guidance_stop} must not be negative")
