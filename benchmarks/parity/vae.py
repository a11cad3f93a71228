"""Golden check of the RQ-VAE against `vae.weights.safetensors` and `vae.io.safetensors`; settings from meta.json."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.common import (
    FEATURE_TOLERANCE,
    GRADIENT_TOLERANCE,
    IMAGE_TOLERANCE,
    LOSS_TOLERANCE,
    AbsentError,
    Check,
    Golden,
    Settings,
    TensorFile,
    close,
    equal,
    fill_from,
    gradient_norms,
    scales_of,
)
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

WEIGHTS = "vae.weights.safetensors"
# Parameters whose gradients the format stores; of all others it stores the norm.
STORED_GRADIENTS = (
    "decoder.conv_out.weight",
    "encoder.conv_in.weight",
    "encoder.mid.attn_1.qkv.bias",
    "post_quant_conv.bias",
    "quant_conv.weight",
    "quantize.embedding.weight",
    "quantize.quant_resi.qresi_ls.0.weight",
)


def vae_config(meta: Settings) -> RQVAEConfig:
    """Settings of the golden tokenizer; multipliers and block numbers are the published ones."""
    vae = meta["vae"]
    return RQVAEConfig(
        scales=scales_of(meta),
        codebook_size=vae["vocab"],
        code_width=vae["z_channels"],
        channels=vae["ch"],
        phi_count=vae["share_quant_resi"],
        phi_ratio=vae["quant_resi"],
        commitment=vae["beta"],
    )


def build_vae(golden: Golden) -> RQVAE:
    """The golden tokenizer, eval mode, float32. Raises ValueError where settings and weights have other sizes."""
    config, weights = vae_config(golden.meta), golden.weights(WEIGHTS)
    for key, shape in (
        ("quantize.embedding.weight", [config.codebook_size, config.code_width]),
        ("encoder.conv_in.weight", [config.channels, 3, 3, 3]),
    ):
        if key not in weights:
            raise AbsentError(f"{WEIGHTS}: {key}")
        if list(weights[key].shape) != shape:
            raise ValueError(
                f"{key} has shape {list(weights[key].shape)}, the settings in meta.json need {shape}"
            )
    phis = sum(key.startswith("quantize.quant_resi.qresi_ls.") and key.endswith(".weight") for key in weights)
    if config.phi_count != phis:
        raise ValueError(f"share_quant_resi={config.phi_count} in meta.json, the weights have {phis}")
    model = RQVAE(config)
    fill_from(model, weights, WEIGHTS)
    return model.eval()


def check_vae(golden: Golden) -> None:
    """All tensors of `vae.io.safetensors`, parameter count, φ indices, gradient norms and use of the codebook."""
    io, vae = golden.tensors("vae.io.safetensors", "vae."), golden.meta["vae"]
    with golden.part("vae"):
        model = build_vae(golden)
        if (count := golden.wanted(vae, "n_params")) is not None:
            actual = sum(parameter.numel() for parameter in model.parameters())
            golden.add(Check("vae.n_params", abs(actual - count), 0, exact=True))
        if (indices := golden.wanted(vae, "phi_index")) is not None:
            golden.add(equal("vae.phi_index", torch.tensor(model.quantize.phi_index), torch.tensor(indices)))
        image = io["image"]
        with torch.no_grad():
            with golden.part("vae.inference"):
                _check_inference(model, io, image)
            with golden.part("vae.noisy"):
                _check_noisy(model, io, image, vae)
        with golden.part("vae.train"):
            _check_training(build_vae(golden), golden, io, image, vae)
    io.finish()


def _check_inference(model: RQVAE, io: TensorFile, image: Tensor) -> None:
    tokens_BL = model.tokenize(image)
    f_hats = list(model.quantize.latents(tokens_BL))
    io.close("enc", model.encoder(image), FEATURE_TOLERANCE)
    io.close("f", model.encode(image), FEATURE_TOLERANCE)
    io.close("fhat", model.tokens_to_latent(tokens_BL), FEATURE_TOLERANCE)
    io.close("switti_input", model.teacher_forcing(tokens_BL), FEATURE_TOLERANCE)
    io.close("rec_unclamped", model.decode(f_hats[-1]), IMAGE_TOLERANCE)
    io.close("rec", model.decode(f_hats[-1]).clamp(-1, 1), IMAGE_TOLERANCE)
    tokens = model.pyramid.split(tokens_BL)
    for k, f_hat_BCHH in enumerate(f_hats):
        io.equal(f"idx.{k}", tokens[k])
        io.close(f"fhat_tok.{k}", f_hat_BCHH, FEATURE_TOLERANCE)
        io.close(f"embed_to_fhat.{k}", f_hat_BCHH, FEATURE_TOLERANCE)
        if f"idx_to_img.{k}" in io:
            io.close(f"idx_to_img.{k}", model.decode(f_hat_BCHH).clamp(-1, 1), IMAGE_TOLERANCE)
    if not io.starting("idx_to_img."):
        # Some scales' images are stored, which ones is for the maker of the folder to choose.
        io.wanted("idx_to_img.0")
    _check_sampler_route(model, io, [io.content.get(f"idx.{k}", own) for k, own in enumerate(tokens)])


def _check_sampler_route(model: RQVAE, io: TensorFile, tokens: list[Tensor]) -> None:
    """The same latents one scale at a time from the golden tokens, as the sampler builds them."""
    pyramid = model.pyramid
    f_hat_BCHH = model.quantize.empty_latent(len(tokens[0]))
    for k in range(pyramid.count):
        f_hat_BCHH = model.quantize.accumulate(k, f_hat_BCHH, model.quantize.embed(tokens[k]))
        io.close(f"next.fhat.{k}", f_hat_BCHH, FEATURE_TOLERANCE)
        following = f_hat_BCHH
        if k + 1 < pyramid.count:
            side = pyramid.sides[k + 1]
            following = model.quantize.next_input(k, f_hat_BCHH).transpose(1, 2).unflatten(2, (side, side))
        io.close(f"next.map.{k}", following, FEATURE_TOLERANCE)


def _check_noisy(model: RQVAE, io: TensorFile, image: Tensor, vae: Settings) -> None:
    """Tokens with latent noise: the stored draws, or those of the seed where they are left out."""
    pyramid, width = model.pyramid, model.quantize.embedding.weight.shape[1]
    names = [f"noisy.noise.{k}" for k in range(pyramid.count)]
    stored = {name: draws for name in names if (draws := io.wanted(name)) is not None}
    if len(stored) < len(names):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(vae["noise_seed"])
            drawn = {
                n: torch.randn(len(image) * size, width) for n, size in zip(names, pyramid.sizes, strict=True)
            }
        stored = drawn | stored
    draws = torch.cat([stored[name].unflatten(0, (len(image), -1)) for name in names], dim=1)
    tokens_BL = model.tokenize(image, vae["noise_std"], noise_BLC=draws)
    for k, part in enumerate(pyramid.split(tokens_BL)):
        io.equal(f"noisy.idx.{k}", part)
    io.close("noisy.switti_input", model.teacher_forcing(tokens_BL), FEATURE_TOLERANCE)


def _check_training(model: RQVAE, golden: Golden, io: TensorFile, image: Tensor, vae: Settings) -> None:
    """One training pass with gradients; usage statistics after it and after a pass over the flipped image."""
    model.train()
    output = model(image)
    loss = F.mse_loss(output.image, image)
    (loss + output.vq_loss).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    io.close("train.rec", output.image, IMAGE_TOLERANCE)
    io.close("train.mse", loss.view(1), LOSS_TOLERANCE)
    io.close("train.vq_loss", output.vq_loss.view(1), LOSS_TOLERANCE)
    prefix = "train.grad."
    last_phi = f"quantize.quant_resi.qresi_ls.{model.quantize.phi_index[-1]}.bias"
    named = {f"{prefix}{key}" for key in (*STORED_GRADIENTS, last_phi) if key in gradients}
    for key in sorted(named | set(io.starting(prefix))):
        if key.removeprefix(prefix) in gradients:
            io.relative(key, gradients[key.removeprefix(prefix)], GRADIENT_TOLERANCE)
    gradient_norms(golden, "vae.train.", model, golden.wanted(vae, "train_grad_l2"), GRADIENT_TOLERANCE)
    usages = golden.wanted(vae, "train_usages") or []
    passes = [int(key.rpartition(".")[2]) for key in io.starting("train.ema_hits.")]
    for n in range(1, max([2, len(usages), *passes]) + 1):
        if n > 1:
            model(image.flip(-1))
        io.close(f"train.ema_hits.{n}", model.quantize.ema_vocab_hit_SV, FEATURE_TOLERANCE)
        if n <= len(usages):
            percent = torch.tensor(model.quantize.usage_percent(len(image)))
            golden.add(close(f"vae.train.usage.{n}", percent, torch.tensor(usages[n - 1]), FEATURE_TOLERANCE))
