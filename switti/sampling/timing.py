"""How long each scale takes."""

import statistics
import time
from itertools import pairwise
from typing import Any

import torch

from switti.models.text.base import TextEmbedding
from switti.sampling.config import SamplingConfig
from switti.sampling.pipeline import SwittiPipeline
from switti.sampling.sampler import PictureNoise, ScaleTrace, sample_latent


def time_scales(
    pipeline: SwittiPipeline, text: TextEmbedding, sampling: SamplingConfig, repetitions: int = 5
) -> dict[str, Any]:
    """Seconds of each scale for the captions of `text` as one batch: medians over repetitions after a warm-up.

    Keys: seconds_per_scale, seconds_total, batch, guidance_stop (null: never), cache_bytes of keys and values.
    Text encoding and decoding of the latent are not included; computing the caption's keys and values is.
    """
    null = pipeline.text_encoder.encode([""]).to(pipeline.device)
    text = text.to(pipeline.device)
    rows: list[list[float]] = []

    def now() -> float:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize(pipeline.device)
        return time.perf_counter()

    marks: list[float] = []
    cache_bytes = 0

    def note(trace: ScaleTrace) -> None:
        nonlocal cache_bytes
        cache_bytes = trace.cache_bytes
        marks.append(now())

    for _ in range(repetitions + 1):
        marks[:] = [now()]
        noise = PictureNoise(list(range(len(text))), pipeline.device)
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=pipeline.autocast):
            sample_latent(
                pipeline.generator,
                pipeline.tokenizer,
                text,
                null,
                sampling,
                noise,
                on_scale_end=note,
            )
        rows.append([after - before for before, after in pairwise(marks)])
    medians = [statistics.median(times) for times in zip(*rows[1:], strict=True)]
    return {
        "seconds_per_scale": medians,
        "seconds_total": sum(medians),
        "batch": len(text),
        "guidance_stop": sampling.guidance_stop,
        "cache_bytes": cache_bytes,
    }
