"""Learning-rate and weight-decay schedules as pure functions of the step."""

import math
from typing import Literal

Shape = Literal["linear", "cosine", "exponential", "constant"]


def warmup_decay(
    step: int,
    *,
    warmup: int,
    total: int,
    shape: Shape = "linear",
    initial: float = 0.005,
    final: float = 0.1,
    knee: float = 0.0,
    knee_value: float = 1.0,
) -> float:
    """Factor on the peak learning rate at optimizer step `step` (0-based) out of `total`.

    During the first `warmup` steps the factor rises linearly from `initial` to 1. After that, with progress
    p in [0, 1]: "linear" goes from 1 to `knee_value` at p = `knee` and on to `final` at p = 1; "exponential"
    holds 1 until the knee, then decays geometrically to `final`; "cosine" is half a cosine; "constant" is 1.
    """
    if step < warmup:
        return initial + (1.0 - initial) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    if shape == "constant":
        return 1.0
    if shape == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if progress < knee:
        return 1.0 if shape == "exponential" else 1.0 + (knee_value - 1.0) * progress / knee
    rest = (progress - knee) / (1.0 - knee)
    if shape == "exponential":
        return final**rest
    return final + (knee_value - final) * (1.0 - rest)


def cosine_between(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step total − 1 (the release's weight decay)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / (total - 1)))
