"""Golden check of the sampler: every case of the published pipeline, scale by scale."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from switti.models.crop import center_crop_condition
from switti.models.rqvae import RQVAE
from switti.models.text.base import TextEmbedding
from switti.parity.common import FEATURE_TOLERANCE, IMAGE_TOLERANCE, Check, close, equal
from switti.parity.transformer import load_golden_transformer
from switti.parity.vae import build_vae
from switti.sampling.config import SamplingConfig
from switti.sampling.filters import gumbel_temperature
from switti.sampling.sampler import ScaleTrace, sample_latent

GUIDED_TOLERANCE = 2e-2
SOFT_TOLERANCE = 5e-3
# A soft mixture passes its probabilities' tolerance on to everything computed from it.
SOFT_FEATURE_TOLERANCE = 5e-3


@dataclass
class BatchNoise:
    """Exp(1) draws of one generator for the whole batch, as published: [B, P, V] a scale, in order."""

    seed: int
    batch: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, scale: int, shape: tuple[int, int]) -> Tensor:
        return torch.empty(self.batch, *shape).exponential_(generator=self.generator)


def sampling_config(kwargs: dict[str, Any]) -> SamplingConfig:
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


def _text(pool: dict[str, Tensor], rows: list[int]) -> TextEmbedding:
    return TextEmbedding(
        pool["prompt_embeds"][rows].float(), pool["attn_bias"][rows] == 0, pool["pooled"][rows].float()
    )


def _check_scale(name: str, trace: ScaleTrace, golden: dict[str, Tensor], ratio: float) -> list[Check]:
    """Compares what the golden file holds of one scale."""
    k = trace.scale
    soft_before = any(f"soft.{j}" in golden for j in range(k))
    features = SOFT_FEATURE_TOLERANCE if soft_before else FEATURE_TOLERANCE
    checks = []

    def compare(key: str, found: Tensor | None, tolerance: float) -> None:
        expected = golden.get(f"{key}.{k}")
        if expected is None:
            return
        if found is None:
            checks.append(Check(f"{name}/{key}.{k}", float("inf"), tolerance))
            return
        # Rows that nothing uses are not computed: compare the ones that exist.
        expected = expected[: len(found)] if key == "logits" else expected
        same = equal if key in ("tokens", "mode") else close
        arguments = (f"{name}/{key}.{k}", found, expected)
        checks.append(same(*arguments) if same is equal else close(*arguments, tolerance))

    compare("mode", torch.tensor([int(trace.soft_BPV is not None)]), 0.0)
    compare("logits", trace.logits, features)
    compare("sampler_in", trace.guided_BPV, GUIDED_TOLERANCE)
    compare("tokens", trace.tokens_BP, 0.0)
    compare("soft", trace.soft_BPV, SOFT_TOLERANCE)
    compare("noise", trace.noise_BPV, 1e-6)
    compare("tau", torch.tensor([gumbel_temperature(ratio)]), 1e-6)
    compare("fhat", trace.latent_BCHW, SOFT_FEATURE_TOLERANCE if trace.soft_BPV is not None else features)
    return checks


def check_case(
    folder: Path,
    meta: dict[str, Any],
    vae: RQVAE,
    name: str,
    golden: dict[str, Tensor],
    pool: dict[str, Tensor],
) -> list[Check]:
    """One case of meta.json `sampling.cases`, named `<model>_<attention>/<case>`."""
    case = meta["sampling"]["cases"][name]
    model = load_golden_transformer(folder, meta, case["model"], case["use_ar"])
    batch = len(case["prompt_index"])
    config = sampling_config(case["kwargs"])
    noise: Callable[[int, tuple[int, int]], Tensor | None]
    noise = (lambda scale, shape: None) if case["seed"] is None else BatchNoise(case["seed"], batch)
    crop = center_crop_condition(torch.full((batch,), 512), torch.full((batch,), 512))
    checks: list[Check] = []

    def compare(trace: ScaleTrace) -> None:
        checks.extend(_check_scale(f"sampling.{name}", trace, golden, model.pyramid.ratio(trace.scale)))

    latent = sample_latent(
        model,
        vae,
        _text(pool, case["prompt_index"]),
        _text(pool, [case["null_prompt_index"]]),
        config,
        noise,
        crop,
        compare,
    )
    soft = any(key.startswith("soft.") for key in golden)
    tolerance = SOFT_FEATURE_TOLERANCE if soft else FEATURE_TOLERANCE
    checks.append(close(f"sampling.{name}/fhat_final", latent, golden["fhat_final"], tolerance))
    if "image01" in golden:
        with torch.no_grad():
            image = (vae.decode(latent).clamp(-1, 1) + 1) / 2
        image_tolerance = SOFT_FEATURE_TOLERANCE if soft else IMAGE_TOLERANCE
        checks.append(close(f"sampling.{name}/image01", image, golden["image01"], image_tolerance))
    return checks


def check_sampling(folder: Path, meta: dict[str, Any]) -> list[Check]:
    """All cases; a stored tensor that nothing compares counts as failed."""
    vae = build_vae(folder, meta)
    pool = load_file(folder / "sampling_prompts.safetensors")
    checks = []
    for name in meta["sampling"]["cases"]:
        group, case = name.split("/")
        stored = load_file(folder / f"sampling_{group}.safetensors")
        golden = {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}
        found = check_case(folder, meta, vae, name, golden, pool)
        compared = {check.quantity.removeprefix(f"sampling.{name}/") for check in found}
        left_out = [key for key in golden if key not in compared]
        checks += found + [
            Check(f"sampling.{name}/{key} not compared", float("inf"), 0.0) for key in left_out
        ]
    return checks
