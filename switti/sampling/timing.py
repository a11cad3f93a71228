"""Timing of each scale, of one sampler or of several in turn."""

import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from switti.sampling.config import SamplingConfig
from switti.sampling.noise import ImageNoise
from switti.sampling.pipeline import SwittiPipeline
from switti.sampling.sampler import ScaleTrace, sample_latent
from switti.text.base import TextEmbedding

ROUNDS = 9


@dataclass(frozen=True)
class TimedCase:
    """A timed batch: the captions of `text` as one batch, with these settings."""

    pipeline: SwittiPipeline
    text: TextEmbedding
    sampling: SamplingConfig


def time_in_turn(cases: Sequence[TimedCase], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Seconds of each scale of every case: medians over rounds after a warm-up. Each round times all cases.

    A change of the machine's load thus meets all cases alike, and ratios of one round's numbers bear it best; each
    round starts with another case. Text encoding and decoding of the latent are not included; computing the caption's
    keys and values is.

    Keys: seconds_per_scale, seconds_total, batch, guidance_stop (null: never), cache_bytes of keys and values,
    seconds_by_round, processor_seconds_by_round (on a CPU: of all threads of this process, without the turns of other
    programs; elsewhere empty), and timed_together, which is the same for all cases of one call and for no others.
    """
    prepared = [
        (case, case.text.to(case.pipeline.device), _null(case.pipeline).to(case.pipeline.device))
        for case in cases
    ]
    rows: list[list[list[float]]] = [[] for _ in cases]
    processor: list[list[float]] = [[] for _ in cases]
    caches = [0] * len(cases)
    for i, (case, text, null) in enumerate(prepared):  # warm-up
        _, caches[i] = _one_batch(case, text, null)
    for number in range(rounds):
        for i in ((number + place) % len(cases) for place in range(len(cases))):
            begun = time.process_time()
            rows[i].append(_one_batch(*prepared[i])[0])
            if cases[i].pipeline.device.type == "cpu":
                processor[i].append(time.process_time() - begun)
    together = {"timed_together": uuid.uuid4().hex}
    return [
        _result(case, times, cache) | {"processor_seconds_by_round": seconds} | together
        for case, times, cache, seconds in zip(cases, rows, caches, processor, strict=True)
    ]


def _null(pipeline: SwittiPipeline) -> TextEmbedding:
    return pipeline.text_encoder.encode([""])


def _one_batch(case: TimedCase, text: TextEmbedding, null: TextEmbedding) -> tuple[list[float], int]:
    """(seconds of each scale, bytes of keys and values at the last one)."""
    pipeline = case.pipeline
    cache_bytes = 0

    def now() -> float:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize(pipeline.device)
        return time.perf_counter()

    def note(trace: ScaleTrace) -> None:
        nonlocal cache_bytes
        cache_bytes = trace.cache_bytes
        marks.append(now())

    noise = ImageNoise(list(range(len(text))), pipeline.device)
    marks = [now()]
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=pipeline.autocast):
        sample_latent(
            pipeline.generator, pipeline.tokenizer, text, null, case.sampling, noise, on_scale_end=note
        )
    return [after - before for before, after in pairwise(marks)], cache_bytes


def _result(case: TimedCase, rows: list[list[float]], cache_bytes: int) -> dict[str, Any]:
    medians = [statistics.median(times) for times in zip(*rows, strict=True)]
    return {
        "seconds_per_scale": medians,
        "seconds_total": sum(medians),
        "seconds_by_round": [sum(row) for row in rows],
        "batch": len(case.text),
        "guidance_stop": case.sampling.guidance_stop,
        "cache_bytes": cache_bytes,
    }
