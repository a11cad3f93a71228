"""RQ-VAE against `vae.weights.safetensors` and `vae.io.safetensors`; every setting comes from meta.json."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switti.models.config import RQVAEConfig
from switti.models.rqvae import RQVAE
from switti.parity.common import (
    FEATURE_TOLERANCE,
    GRADIENT_TOLERANCE,
    IMAGE_TOLERANCE,
    LOSS_TOLERANCE,
    Check,
    close,
    equal,
    gradient_norms,
    load_float32,
    relative,
)

Tensors = dict[str, Tensor]


def vae_config(meta: dict[str, Any]) -> RQVAEConfig:
    """Settings of the golden tokenizer; multipliers and block numbers are the published ones."""
    vae = meta["vae"]
    return RQVAEConfig(
        scales=list(meta["patch_nums"]),
        codebook_size=vae["vocab"],
        code_width=vae["z_channels"],
        channels=vae["ch"],
        phi_count=vae["share_quant_resi"],
        phi_ratio=vae["quant_resi"],
        commitment=vae["beta"],
    )


def build_vae(folder: Path, meta: dict[str, Any]) -> RQVAE:
    """The golden tokenizer, eval mode, float32."""
    model = RQVAE(vae_config(meta))
    model.load_state_dict(load_float32(folder / "vae.weights.safetensors"))
    return model.eval()


def check_vae(folder: Path, meta: dict[str, Any]) -> list[Check]:
    """All tensors of `vae.io.safetensors`, parameter count and gradient norms. One left out counts as failed."""
    golden = load_float32(folder / "vae.io.safetensors")
    model = build_vae(folder, meta)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checks = [
        Check("n_params", abs(parameters - meta["vae"]["n_params"]), 0, exact=True),
        equal("phi_index", torch.tensor(model.quantize.phi_index), torch.tensor(meta["vae"]["phi_index"])),
    ]
    with torch.no_grad():
        checks += _check_inference(model, golden) + _check_noisy(model, golden, meta["vae"]["noise_std"])
    checks += _check_training(build_vae(folder, meta), golden, meta["vae"])
    covered = {check.quantity for check in checks} | {"image"}
    covered |= {key for key in golden if key.startswith("noisy.noise.")}
    return checks + [
        Check(f"{key} (not compared)", float("inf"), 0.0) for key in sorted(golden.keys() - covered)
    ]


def _check_inference(model: RQVAE, golden: Tensors) -> list[Check]:
    image = golden["image"]
    f_BCHH = model.encode(image)
    tokens_BL = model.tokenize(image)
    f_hats = list(model.quantize.latents(tokens_BL))
    found: list[tuple[str, Tensor, float]] = [
        ("enc", model.encoder(image), FEATURE_TOLERANCE),
        ("f", f_BCHH, FEATURE_TOLERANCE),
        ("fhat", model.tokens_to_latent(tokens_BL), FEATURE_TOLERANCE),
        ("switti_input", model.teacher_forcing(tokens_BL), FEATURE_TOLERANCE),
        ("rec_unclamped", model.decode(f_hats[-1]), IMAGE_TOLERANCE),
        ("rec", model.decode(f_hats[-1]).clamp(-1, 1), IMAGE_TOLERANCE),
    ]
    for k, f_hat_BCHH in enumerate(f_hats):
        found.append((f"fhat_tok.{k}", f_hat_BCHH, FEATURE_TOLERANCE))
        found.append((f"embed_to_fhat.{k}", f_hat_BCHH, FEATURE_TOLERANCE))
        if f"idx_to_img.{k}" in golden:
            found.append((f"idx_to_img.{k}", model.decode(f_hat_BCHH).clamp(-1, 1), IMAGE_TOLERANCE))
    found += _sampler_route(model, golden)
    checks = [equal(f"idx.{k}", t, golden[f"idx.{k}"]) for k, t in enumerate(model.pyramid.split(tokens_BL))]
    return checks + [close(key, value, golden[key], tolerance) for key, value, tolerance in found]


def _sampler_route(model: RQVAE, golden: Tensors) -> list[tuple[str, Tensor, float]]:
    """The same latents one scale at a time from the golden tokens, as the sampler builds them."""
    pyramid, found = model.pyramid, []
    f_hat_BCHH = model.quantize.empty_latent(golden["image"].shape[0])
    for k in range(pyramid.count):
        h_BPC = model.quantize.embed(golden[f"idx.{k}"])
        f_hat_BCHH = model.quantize.accumulate(k, f_hat_BCHH, h_BPC)
        found.append((f"next.fhat.{k}", f_hat_BCHH, FEATURE_TOLERANCE))
        following = f_hat_BCHH
        if k + 1 < pyramid.count:
            side = pyramid.sides[k + 1]
            following = model.quantize.next_input(k, f_hat_BCHH).transpose(1, 2).unflatten(2, (side, side))
        found.append((f"next.map.{k}", following, FEATURE_TOLERANCE))
    return found


def _check_noisy(model: RQVAE, golden: Tensors, noise_std: float) -> list[Check]:
    batch = golden["image"].shape[0]
    draws = [golden[f"noisy.noise.{k}"].unflatten(0, (batch, -1)) for k in range(model.pyramid.count)]
    tokens_BL = model.tokenize(golden["image"], noise_std, noise_BLC=torch.cat(draws, dim=1))
    parts = enumerate(model.pyramid.split(tokens_BL))
    checks = [equal(f"noisy.idx.{k}", part, golden[f"noisy.idx.{k}"]) for k, part in parts]
    inputs = model.teacher_forcing(tokens_BL)
    return [*checks, close("noisy.switti_input", inputs, golden["noisy.switti_input"], FEATURE_TOLERANCE)]


def _check_training(model: RQVAE, golden: Tensors, vae: dict[str, Any]) -> list[Check]:
    """One training pass with gradients; usage statistics after it and after a pass over the flipped picture."""
    model.train()
    image = golden["image"]
    output = model(image)
    loss = F.mse_loss(output.image, image)
    (loss + output.vq_loss).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    checks = [
        close("train.rec", output.image, golden["train.rec"], IMAGE_TOLERANCE),
        close("train.mse", loss.view(1), golden["train.mse"], LOSS_TOLERANCE),
        close("train.vq_loss", output.vq_loss.view(1), golden["train.vq_loss"], LOSS_TOLERANCE),
    ]
    prefix = "train.grad."
    for key in [key for key in golden if key.startswith(prefix)]:
        checks.append(relative(key, gradients.get(key.removeprefix(prefix)), golden[key], GRADIENT_TOLERANCE))
    norms = {key: gradient.norm().item() for key, gradient in gradients.items() if gradient is not None}
    checks += gradient_norms(norms, vae["train_grad_l2"], GRADIENT_TOLERANCE)
    for n, usage in enumerate(vae["train_usages"], start=1):
        if n > 1:
            model(image.flip(-1))
        key = f"train.ema_hits.{n}"
        checks.append(close(key, model.quantize.ema_vocab_hit_SV, golden[key], FEATURE_TOLERANCE))
        percent = torch.tensor(model.quantize.usage_percent(image.shape[0]))
        checks.append(close(f"train.usage.{n}", percent, torch.tensor(usage), FEATURE_TOLERANCE))
    return checks
