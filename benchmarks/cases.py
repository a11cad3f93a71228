"""Benchmark cases: a training step and a sampling call, with random weights and captions.

Shape suffixes as in switti/models/transformer.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import synchronize
from benchmarks.reference_model import DenseTransformer, same_weights, sample_latent_plainly
from switti.losses.cross_entropy import token_losses
from switti.models.config import GeneratorConfig
from switti.models.transformer import Condition, ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import ScaleTrace, sample_latent
from switti.scales import PYRAMIDS
from switti.text.base import TextEmbedding
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.fill import fill_generator

TEXT_TOKENS = 77
VARIANTS = ("non_causal", "causal")


@dataclass(frozen=True)
class Size:
    """Size of the transformer under test. The caption side is the paper's."""

    width: int = 512
    heads: int = 8
    depth: int = 8

    def config(self, resolution: int, visibility: str) -> GeneratorConfig:
        return GeneratorConfig(
            visibility=visibility,  # type: ignore[arg-type]
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            scales=PYRAMIDS[resolution],
        )


def random_captions(config: GeneratorConfig, batch: int, device: torch.device) -> TextEmbedding:
    return TextEmbedding(
        torch.randn(batch, TEXT_TOKENS, config.text_width, device=device),
        torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=device),
        torch.randn(batch, config.pooled_width, device=device),
    )


def build(config: GeneratorConfig, device: torch.device) -> ScaleTransformer:
    """Random weights with gates that are not near zero, so that activations have their usual sizes."""
    torch.manual_seed(0)
    model = ScaleTransformer(config)
    for block in model.typed_blocks:
        torch.nn.init.normal_(block.ada_lin[1].weight, std=0.02)  # type: ignore[arg-type]
    return model.to(device)


def training_step(model: ScaleTransformer, batch: int, mixed: bool) -> Callable[[], None]:
    """Forward and backward pass of one batch, as in training: mixed precision, float32 head and loss."""
    config, device = model.config, model.pos_start.device
    length = model.pyramid.length
    text = random_captions(config, batch, device)
    x_BMC = torch.randn(batch, length - 1, config.code_width, device=device)
    tokens_BL = torch.randint(config.codebook_size, (batch, length), device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = token_losses(model(x_BMC, text.tokens_BTC, text.mask_BT, text.pooled_BP), tokens_BL).mean()
        # Outside autocast, as Lightning does: the head's gradients stay float32.
        loss.backward()

    return step


def training_pair(
    size: Size, resolution: int, visibility: str, batch: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """{"ours", "dense"}: the same step on the same weights in both formulations."""
    model = build(size.config(resolution, visibility), device).train()
    return {
        "ours": training_step(model, batch, mixed=True),
        "dense": training_step(same_weights(model, DenseTransformer), batch, mixed=True),
    }


@dataclass
class SamplingCase:
    """A model in bfloat16 with what sampling needs; `run` samples once and returns seconds per scale."""

    model: ScaleTransformer
    tokenizer: RQVAE
    text: TextEmbedding
    null: TextEmbedding

    @classmethod
    def of(cls, model: ScaleTransformer, batch: int) -> "SamplingCase":
        config, device = model.config, model.pos_start.device
        quantizer_only = RQVAEConfig(scales=list(config.scales), channels=32, residual_blocks=1)
        torch.manual_seed(1)
        both = random_captions(config, batch + 1, device)
        return cls(model, RQVAE(quantizer_only).to(device).eval(), both[:batch], both[batch:])

    def run(self, sampling: SamplingConfig, seeds: list[int]) -> list[float]:
        marks: list[float] = []

        def mark(_trace: ScaleTrace | None = None) -> None:
            synchronize()
            marks.append(time.perf_counter())

        mark()
        noise = ImageNoise(seeds, self.text.pooled_BP.device)
        sample_latent(self.model, self.tokenizer, self.text, self.null, sampling, noise, on_scale_end=mark)
        return [after - before for before, after in pairwise(marks)]

    def run_plainly(self, plain: DenseTransformer, sampling: SamplingConfig, seed: int) -> list[float]:
        """The same by the plain formulation, with one generator for the batch."""
        marks = [time.perf_counter()]

        def mark() -> None:
            synchronize()
            marks.append(time.perf_counter())

        generator = torch.Generator(self.text.pooled_BP.device).manual_seed(seed)
        sample_latent_plainly(
            plain,
            self.tokenizer,
            self.text,
            self.null,
            sampling,
            generator,
            on_scale_end=mark,
        )
        return [after - before for before, after in pairwise(marks)]

    def share_outside(self, sampling: SamplingConfig, seeds: list[int]) -> float:
        """Share of the time of one call that is spent outside the transformer: filters, draws, pyramid."""
        timed = same_weights(self.model, TimedTransformer)
        total = sum(replace(self, model=timed).run(sampling, seeds))
        return 1.0 - timed.seconds / total


class TimedTransformer(ScaleTransformer):
    """Adds up the seconds that sampling spends in the model."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.seconds = 0.0

    def prepare(self, *args: Any, **kwargs: Any) -> Condition:
        with self._clock():
            return super().prepare(*args, **kwargs)

    def forward_scale(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._clock():
            return super().forward_scale(*args, **kwargs)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        synchronize()
        begun = time.perf_counter()
        yield
        synchronize()
        self.seconds += time.perf_counter() - begun


def with_visibility(model: ScaleTransformer, visibility: str) -> ScaleTransformer:
    """The causal or non-causal model that shares these weights: both variants have the same parameters."""
    config = replace(model.config, visibility=visibility)  # type: ignore[arg-type]
    other = fill_generator(config, model.state_dict(), "the other variant", model.head.weight.dtype)
    return other.to(model.head.weight.device).train(model.training)


def late_stop(sampling: SamplingConfig, resolution: int) -> SamplingConfig:
    """Guidance stopped two scales early."""
    return replace(sampling, guidance_stop=len(PYRAMIDS[resolution]) - 2)
