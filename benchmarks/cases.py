"""What is measured: training steps, sampling, tokenising. Shape suffixes as in switti/models/transformer.py."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from benchmarks.measure import synchronise
from benchmarks.reference_model import same_weights, sample_latent_plainly
from switti.losses.cross_entropy import token_losses
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.sampler import PictureNoise, ScaleTrace, sample_latent
from switti.scales import PYRAMIDS
from switti.text.base import TextEmbedding
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

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


def training_step(model: ScaleTransformer, batch: int, half: bool) -> Callable[[], None]:
    """Forward and backward pass of one batch, as in training: mixed precision, float32 head and loss."""
    config, device = model.config, model.pos_start.device
    length = model.pyramid.length
    text = random_captions(config, batch, device)
    x_BMC = torch.randn(batch, length - 1, config.code_width, device=device)
    tokens_BL = torch.randint(config.codebook_size, (batch, length), device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = token_losses(model(x_BMC, text.tokens_BTC, text.mask_BT, text.pooled_BP), tokens_BL).mean()
        loss.backward()  # outside autocast, as Lightning does: the head's gradients stay float32

    return step


def training_pair(
    size: Size, resolution: int, visibility: str, batch: int, device: torch.device, half: bool = True
) -> dict[str, Callable[[], None]]:
    """{"ours", "dense"}: the same step on the same weights in both formulations."""
    model = build(size.config(resolution, visibility), device).train()
    return {
        "ours": training_step(model, batch, half),
        "dense": training_step(same_weights(model), batch, half),
    }


@dataclass
class SamplingCase:
    """A model in bfloat16 with what sampling needs; `run` samples once and returns seconds a scale."""

    model: ScaleTransformer
    tokenizer: RQVAE
    text: TextEmbedding
    null: TextEmbedding

    @classmethod
    def of(cls, model: ScaleTransformer, batch: int) -> "SamplingCase":
        config, device = model.config, model.pos_start.device
        quantiser_only = RQVAEConfig(scales=list(config.scales), channels=32, residual_blocks=1)
        torch.manual_seed(1)
        both = random_captions(config, batch + 1, device)
        return cls(model, RQVAE(quantiser_only).to(device).eval(), both[:batch], both[batch:])

    def run(self, sampling: SamplingConfig, seeds: list[int]) -> list[float]:
        marks = [time.perf_counter()]

        def mark(_trace: ScaleTrace) -> None:
            marks.append(time.perf_counter())

        noise = PictureNoise(seeds, self.text.pooled_BP.device)
        sample_latent(self.model, self.tokenizer, self.text, self.null, sampling, noise, on_scale_end=mark)
        return [after - before for before, after in pairwise(marks)]

    def run_plainly(self, plain: Any, sampling: SamplingConfig, seeds: list[int]) -> None:
        noise = PictureNoise(seeds, self.text.pooled_BP.device)
        sample_latent_plainly(plain, self.tokenizer, self.text, self.null, sampling, noise)

    def share_outside(self, sampling: SamplingConfig, seeds: list[int]) -> float:
        """Share of the time of one call that is spent outside the transformer: filters, draws, pyramid."""
        inside = 0.0
        forward, prepare = self.model.forward_scale, self.model.prepare

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                synchronise()
                begun = time.perf_counter()
                result = function(*args, **kwargs)
                synchronise()
                inside += time.perf_counter() - begun
                return result

            return call

        self.model.forward_scale, self.model.prepare = timed(forward), timed(prepare)  # type: ignore[method-assign]
        try:
            total = sum(self.run(sampling, seeds))
        finally:
            del self.model.forward_scale, self.model.prepare
        return 1.0 - inside / total


def with_visibility(model: ScaleTransformer, variant: str) -> None:
    """Makes a model causal or non-causal in place: both have the same parameters."""
    model.config = replace(model.config, visibility=variant)  # type: ignore[arg-type]
    for block in model.typed_blocks:
        block.attn.visibility = variant


def late_stop(sampling: SamplingConfig, resolution: int) -> SamplingConfig:
    """Guidance stopped two scales early."""
    return replace(sampling, guidance_stop=len(PYRAMIDS[resolution]) - 2)
