"""Sampling section of a plan: kernels and predicted milliseconds by scale and per image, as text and for JSON."""

from dataclasses import asdict
from typing import Any

from benchmarks.cost_model.hardware import ACCELERATORS
from benchmarks.cost_model.sampling_latency import (
    Assumptions,
    SamplingLatency,
    rows_by_scale,
    sampling_latency,
    trace_sampling,
)
from configs.schema import RunConfig
from switti.tables import aligned


def plan_sampling(
    config: RunConfig, gpu: str, images: int, assumed: Assumptions | None = None
) -> SamplingLatency:
    """Of a batch of `images` with the settings `sampling` of a generator run."""
    traced = trace_sampling(config.model, config.tokenizer, config.sampling, images, config.text.max_length)
    rows = rows_by_scale(config.model, config.sampling, images)
    return sampling_latency(traced, images, rows, ACCELERATORS[gpu], assumed or Assumptions())


def lines_of_sampling(config: RunConfig, predicted: SamplingLatency) -> list[str]:
    stop = config.sampling.guidance_stop
    guided = "at all scales" if stop is None else f"before scale {stop}"
    header = ("sampling, ms a batch", "rows", "kernels", "on the device", "eager", "captured")
    named = [("  caption", "", predicted.caption)]
    sides = config.model.scales
    named += [
        (f"  scale {k} ({side}²)", str(rows), part)
        for k, (side, rows, part) in enumerate(zip(sides, predicted.rows, predicted.scales, strict=True))
    ]
    named.append(("  decoding", "", predicted.decode))
    rows: list[tuple[str, ...]] = [header]
    for name, count, part in named:
        seconds = (_milli(value) for value in (part.device, part.eager, part.captured))
        rows.append((name, count, str(part.kernels), *seconds))
    return [
        *aligned(rows),
        f"  {_images(predicted.images)} in bfloat16, guidance {guided}, without text encoders: "
        f"{1e3 * predicted.eager:.3g} ms an image, {1e3 * predicted.captured:.3g} ms captured in a CUDA graph; "
        f"{1e3 * predicted.step:.3g} ms an image and scale",
    ]


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"


def _milli(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if seconds < 1e-3 else f"{1e3 * seconds:.1f}"


def as_json(predicted: SamplingLatency) -> dict[str, Any]:
    """Seconds, those of parts for the batch."""
    return {
        **asdict(predicted),
        "eager_per_image": predicted.eager,
        "captured_per_image": predicted.captured,
    }
