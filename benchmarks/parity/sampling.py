"""Golden check of the sampler: every case of the published pipeline, scale by scale."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.parity.common import (
    FEATURE_TOLERANCE,
    IMAGE_TOLERANCE,
    Golden,
    Settings,
    TensorFile,
    close,
)
from benchmarks.parity.transformer import load_golden_transformer
from benchmarks.parity.vae import build_vae
from switti.models.crop_embedding import center_crop_condition
from switti.sampling.config import SamplingConfig
from switti.sampling.filters import gumbel_temperature
from switti.sampling.sampler import ScaleTrace, sample_latent
from switti.text.base import TextEmbedding
from switti.tokenizer.rqvae import RQVAE

GUIDED_TOLERANCE = 2e-2
SOFT_TOLERANCE = 5e-3
# A soft mixture passes its probabilities' tolerance on to everything computed from it.
SOFT_FEATURE_TOLERANCE = 5e-3


@dataclass
class BatchNoise:
    """Exp(1) draws of one generator for the batch, as published: [B, P, V] per scale, in order."""

    seed: int
    batch: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, scale: int, shape: tuple[int, int]) -> Tensor:
        return torch.empty(self.batch, *shape).exponential_(generator=self.generator)


def sampling_config(kwargs: Settings) -> SamplingConfig:
    """The published pipeline's arguments as our settings. Its guidance stop defaults to scale 10."""
    return SamplingConfig(
        guidance=kwargs["cfg"],
        guidance_start=kwargs.get("turn_on_cfg_start_si", 0),
        guidance_stop=kwargs.get("turn_off_cfg_start_si", 10),
        late_temperature=kwargs.get("last_scale_temp"),
        top_k=kwargs.get("top_k", 400),
        top_p=kwargs.get("top_p", 0.95),
        gumbel=kwargs.get("more_smooth", False),
        gumbel_start=kwargs.get("smooth_start_si", 0),
    )


def _text(pool: TensorFile, rows: list[int]) -> TextEmbedding:
    return TextEmbedding(
        pool["prompt_embeds"][rows].float(), pool["attn_bias"][rows] == 0, pool["pooled"][rows].float()
    )


class _ScaleComparison:
    """Compares what the golden file holds of each scale of a case."""

    def __init__(self, file: TensorFile, case: str, ratios: list[float], stochastic: bool) -> None:
        self.file, self.case, self.ratios, self.stochastic = file, case, ratios, stochastic
        self.soft = False

    def __call__(self, trace: ScaleTrace) -> None:
        k, last = trace.scale, trace.scale + 1 == len(self.ratios)
        # A soft mixture passes its probabilities' tolerance on to everything computed from it.
        features = SOFT_FEATURE_TOLERANCE if self.soft else FEATURE_TOLERANCE
        self.file.equal(f"{self.case}/mode.{k}", torch.tensor([int(trace.soft_BPV is not None)]))
        self._logits(f"{self.case}/logits.{k}", trace.logits, features)
        self.file.close(f"{self.case}/sampler_in.{k}", trace.guided_BPV, GUIDED_TOLERANCE)
        if trace.soft_BPV is None:
            assert trace.tokens_BP is not None  # one of the two is there
            self.file.equal(f"{self.case}/tokens.{k}", trace.tokens_BP)
        else:
            self.soft, features = True, SOFT_FEATURE_TOLERANCE
            self.file.close(f"{self.case}/soft.{k}", trace.soft_BPV, SOFT_TOLERANCE)
            self.file.close(f"{self.case}/tau.{k}", torch.tensor([gumbel_temperature(self.ratios[k])]), 1e-6)
        if self.stochastic and trace.noise_BPV is not None:
            self.file.close(f"{self.case}/noise.{k}", trace.noise_BPV, 1e-6)
        self.file.close(f"{self.case}/fhat.{k}", trace.latent_BCHW, features, optional=last)

    def _logits(self, key: str, actual: Tensor, tolerance: float) -> None:
        expected = self.file.wanted(key)
        if expected is not None:
            # Rows that nothing uses are not computed: compare the ones that exist.
            check = close(f"{self.file.prefix}{key}", actual, expected[: len(actual)], tolerance)
            self.file.golden.add(check)


def _noise(
    file: TensorFile, case: str, settings: Settings, count: int
) -> Callable[[int, tuple[int, int]], Tensor | None]:
    """Of the case's seed (null: none is drawn), or the stored draws where the seed is left out."""
    stored = [f"{case}/noise.{k}" for k in range(count)]
    if "seed" not in settings and all(key in file for key in stored):
        return lambda scale, shape: file[stored[scale]]
    if settings["seed"] is None:
        return lambda scale, shape: None
    return BatchNoise(settings["seed"], len(settings["prompt_index"]))


def check_case(golden: Golden, vae: RQVAE, pool: TensorFile, file: TensorFile, name: str) -> None:
    """One case of meta.json `sampling.cases`, named `<model>_<attention>/<case>`, on the device of `vae`."""
    device = vae.quantize.embedding.weight.device
    case, settings = name.split("/")[1], golden.meta["sampling"]["cases"][name]
    model = load_golden_transformer(golden, settings["model"], settings["use_ar"]).to(device)
    batch = len(settings["prompt_index"])
    drawn = _noise(file, case, settings, model.pyramid.count)
    ratios = [model.pyramid.ratio(k) for k in range(model.pyramid.count)]
    compare = _ScaleComparison(file, case, ratios, settings.get("seed") is not None)
    crop = center_crop_condition(torch.full((batch,), 512), torch.full((batch,), 512)).to(device)

    def noise(scale: int, shape: tuple[int, int]) -> Tensor | None:
        draws = drawn(scale, shape)
        return None if draws is None else draws.to(device)

    latent = sample_latent(
        model,
        vae,
        _text(pool, settings["prompt_index"]).to(device),
        _text(pool, [settings["null_prompt_index"]]).to(device),
        sampling_config(settings["kwargs"]),
        noise,
        crop,
        compare,
    )
    tolerance = SOFT_FEATURE_TOLERANCE if compare.soft else FEATURE_TOLERANCE
    file.close(f"{case}/fhat_final", latent, tolerance)
    if f"{case}/image01" in file:
        with torch.no_grad():
            image = (vae.decode(latent).clamp(-1, 1) + 1) / 2
        file.close(f"{case}/image01", image, SOFT_FEATURE_TOLERANCE if compare.soft else IMAGE_TOLERANCE)


def check_sampling(golden: Golden) -> None:
    """All cases, and every tensor that a case stores."""
    cases = golden.meta["sampling"]["cases"]
    groups = sorted({name.split("/")[0] for name in cases})
    files = {group: golden.tensors(f"sampling_{group}.safetensors", f"sampling.{group}/") for group in groups}
    with golden.part("sampling"):
        vae = build_vae(golden)
        pool = golden.tensors("sampling_prompts.safetensors", "sampling.prompts.")
        for name in cases:
            with golden.part(f"sampling.{name}"):
                check_case(golden, vae, pool, files[name.split("/")[0]], name)
    for file in files.values():
        file.finish()
