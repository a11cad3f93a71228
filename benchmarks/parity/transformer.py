"""Golden check of the scale transformer: teacher-forced pass, loss, gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.parity.common import (
    FEATURE_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    AbsentError,
    Check,
    Golden,
    Settings,
    TensorFile,
    fill_from,
    gradient_norms,
    scales_of,
)
from benchmarks.reference_model import dense_mask
from switti.losses.cross_entropy import token_losses
from switti.models.config import GeneratorConfig
from switti.models.crop_embedding import center_crop_condition
from switti.models.transformer import ScaleTransformer

# Parameters whose gradients the format stores (of matrices with more than 2 048 columns the first columns).
STORED_GRADIENTS = (
    *(
        f"blocks.0.{name}"
        for name in (
            "ada_lin.1.bias", "ada_lin.1.weight", "attention_y_norm.weight", "attn.proj.weight", "attn.to_qkv.bias",
            "attn.to_qkv.weight", "crop_cond_scales", "cross_attention_norm1.weight", "cross_attention_norm2.weight",
            "cross_attn.to_kv.bias", "cross_attn.to_q.weight", "ffn_norm1.weight", "ffn_norm2.weight",
            "self_attention_norm1.weight", "self_attention_norm2.weight",
        )
    ),
    *(f"blocks.1.ffn.{name}" for name in ("down_proj.weight", "gate_proj.weight", "up_proj.weight")),
    *(f"blocks.1.ffn.{name}" for name in ("fc1.bias", "fc1.weight", "fc2.weight")),
    "blocks.1.cross_attn.proj.weight", "crop_proj.weight", "head.bias", "head.weight", "head_nm.ada_lin.1.weight",
    "lvl_embed.weight", "pos_start", "text_pooler.bias", "word_embed.bias", "word_embed.weight",
)  # fmt: skip
STORED_COLUMNS = ("grad_cols0_128.text_pooler.weight", "grad_cols0_64.blocks.0.cross_attn.to_kv.weight")


def generator_config(meta: Settings, settings: Settings, weights: Mapping[str, Tensor]) -> GeneratorConfig:
    """Settings of a golden transformer. Raises AbsentError, ValueError where weights and meta.json differ."""
    file = "weights"
    for key in (
        "word_embed.weight", "head.weight", "text_pooler.weight", "blocks.0.attention_y_norm.weight"
    ):  # fmt: skip
        if key not in weights:
            raise AbsentError(f"{file}: {key}")
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    width, code_width = weights["word_embed.weight"].shape
    for name, shown in (("depth", len(blocks)), ("embed_dim", width)):
        if settings[name] != shown:
            raise ValueError(f"{settings.name(name)}={settings[name]} in meta.json, the weights have {shown}")
    return GeneratorConfig(
        visibility="causal" if settings["use_ar"] else "non_causal",
        ffn=settings["ffn"],
        depth=len(blocks),
        width=width,
        heads=settings["heads"],
        scales=scales_of(meta),
        codebook_size=len(weights["head.weight"]),
        code_width=code_width,
        text_width=weights["blocks.0.attention_y_norm.weight"].numel(),
        pooled_width=weights["text_pooler.weight"].shape[1],
        crop_condition=settings.get("use_crop_cond", "crop_proj.weight" in weights),
        rope="pos_1LC" not in weights,
        rope_theta=settings["rope_theta"],
        rope_size=settings["rope_size"],
    )


def load_golden_transformer(golden: Golden, model: str, causal: bool) -> ScaleTransformer:
    """The model `switti_swiglu` or `switti_gelu` of a golden folder, in one of its two variants, in eval mode."""
    variant = f"{model.removeprefix('switti_')}_{'ar' if causal else 'nonar'}"
    settings = golden.meta["switti"][variant]
    file = f"{model}.weights.safetensors"
    weights = golden.weights(file)
    config = generator_config(golden.meta, Settings({"use_ar": causal} | settings, settings.path), weights)
    config.validate("model")
    transformer = ScaleTransformer(config)
    fill_from(transformer, weights, file)
    return transformer.eval()


def teacher_forced_inputs(io: TensorFile) -> tuple[Tensor, ...]:
    """Arguments of the transformer's forward pass. The tokenizer's own output is used where it is left out here."""
    crop = None
    if "in.batch_height" in io and "in.batch_width" in io:
        crop = center_crop_condition(io["in.batch_height"], io["in.batch_width"])
    elif "out.crop_coords" in io:
        crop = io["out.crop_coords"]
    mask = io["in.prompt_attn_bias"] == 0
    tokens = io.wanted("in.x_BLCv_wo_first_l")
    if tokens is None:
        tokens = io.golden.tensors("vae.io.safetensors", "")["switti_input"]
    if crop is None:
        raise AbsentError(f"{io.file}: in.batch_height, in.batch_width")
    return tokens, io["in.prompt_embeds"], mask, io["in.pooled"], crop


def golden_tokens(io: TensorFile, count: int) -> Tensor:
    """Token indices of all `count` scales [B, L]."""
    tokens = io.wanted("in.gt_BL")
    if tokens is not None:
        return tokens
    vae = io.golden.tensors("vae.io.safetensors", "")
    return torch.cat([vae[f"idx.{k}"] for k in range(count)], dim=1)


def _record_outputs(model: ScaleTransformer) -> tuple[dict[str, Tensor], list[Any]]:
    """Hooks that note the outputs which the golden file names."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _module, _args, out: seen.__setitem__(name, out)

    targets: dict[str, nn.Module] = {f"out.block.{i}": block for i, block in enumerate(model.typed_blocks)}
    first = model.typed_blocks[0]
    targets |= {
        "out.block.0.self_attn": first.attn,
        "out.block.0.cross_attn": first.cross_attn,
        "out.block.0.ffn": first.ffn,
        "out.cond": model.text_pooler,
        "out.head_norm": model.head_nm,
    }
    if model.config.crop_condition:
        targets |= {"out.crop_fourier": model.crop_embed, "out.crop_cond": model.crop_proj}
    handles = [module.register_forward_hook(note(name)) for name, module in targets.items()]
    handles.append(first.register_forward_pre_hook(lambda _m, args: seen.__setitem__("out.x_in", args[0])))
    return seen, handles


def _check_buffers(model: ScaleTransformer, io: TensorFile) -> None:
    dense = dense_mask(model.pyramid, model.config.visibility)
    bias = torch.zeros(dense.shape).masked_fill(~dense, -torch.inf)
    io.equal("buffer.attn_bias_for_masking", bias[None, None])
    io.equal("buffer.lvl_1L", model.level_L[None])
    if model.config.rope:
        tables = torch.stack([model.cosine_LK[:, ::2], model.sine_LK[:, 1::2]], dim=-1)[None]
        io.close("buffer.freqs_cis", tables, FEATURE_TOLERANCE)


def _check_gradients(
    golden: Golden, prefix: str, model: ScaleTransformer, io: TensorFile, norms: Settings | None
) -> None:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    stored = io.starting("grad")
    covered = {key.partition(".")[2] for key in stored}
    usual = {*(f"grad.{name}" for name in STORED_GRADIENTS), *STORED_COLUMNS}
    for key in sorted({key for key in usual if key.partition(".")[2] not in covered} | set(stored)):
        kind, _, name = key.partition(".")
        if name not in gradients:
            continue
        actual = gradients[name]
        if kind.startswith("grad_cols0_") and actual is not None:
            actual = actual[:, : int(kind.removeprefix("grad_cols0_"))]
        io.relative(key, actual, GRADIENT_TOLERANCE)
    gradient_norms(golden, prefix, model, norms, GRADIENT_TOLERANCE)


def check_variant(golden: Golden, variant: str) -> None:
    """One of swiglu_nonar, swiglu_ar, gelu_nonar, gelu_ar: buffers, activations, logits, losses, gradients."""
    prefix = f"switti_{variant}."
    io = golden.tensors(f"switti_{variant}.io.safetensors", prefix)
    with golden.part(f"switti_{variant}"):
        model_name, _, attention = variant.rpartition("_")
        settings = golden.meta["switti"][variant]
        model = load_golden_transformer(golden, f"switti_{model_name}", attention == "ar")
        if (count := golden.wanted(settings, "n_params")) is not None:
            parameters = sum(p.numel() for p in model.parameters())
            golden.add(Check(f"{prefix}n_params", abs(parameters - count), 0.0, exact=True))
        _check_buffers(model, io)
        inputs = teacher_forced_inputs(io)
        seen, handles = _record_outputs(model)
        logits = model(*inputs)
        for handle in handles:
            handle.remove()
        for key, actual in seen.items():
            io.close(key, actual, FEATURE_TOLERANCE)
        if model.config.crop_condition:
            if "in.batch_height" in io and "in.batch_width" in io:
                io.equal("out.crop_coords", inputs[4])
            else:
                io.wanted("in.batch_height")
                io.wanted("in.batch_width")
        io.close("out.logits", logits, FEATURE_TOLERANCE)
        with golden.part(f"{prefix}loss"):
            tokens = golden_tokens(io, model.pyramid.count)
            loss = token_losses(logits, tokens).mean()
            io.close("out.loss", loss.view(1), LOSS_TOLERANCE)
            if (smoothing := golden.wanted(settings, "label_smooth")) is not None:
                smooth = token_losses(logits, tokens, smoothing).mean()
                io.close("out.loss_label_smooth", smooth.view(1), LOSS_TOLERANCE)
            loss.backward()
            _check_gradients(golden, prefix, model, io, golden.wanted(settings, "grad_l2"))
    io.finish()


def check_transformers(golden: Golden) -> None:
    """All variants that meta.json lists."""
    for variant in golden.meta["switti"]:
        check_variant(golden, variant)
