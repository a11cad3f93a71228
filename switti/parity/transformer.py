"""Golden check of the scale transformer: teacher-forced pass, loss, gradients, five optimiser steps."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switti.losses import token_losses
from switti.models.config import GeneratorConfig
from switti.models.crop import center_crop_condition
from switti.models.transformer import ScaleTransformer
from switti.parity.common import (
    FEATURE_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Check,
    close,
    equal,
    gradient_norms,
    load_float32,
    relative,
)

BUFFERS = ("lvl_1L", "attn_bias_for_masking")


def load_golden_transformer(folder: Path, meta: dict[str, Any], model: str, causal: bool) -> ScaleTransformer:
    """The model `switti_swiglu` or `switti_gelu` of a golden folder, in one of its two variants, in eval mode."""
    settings = meta["switti"][f"{model.removeprefix('switti_')}_{'ar' if causal else 'nonar'}"]
    weights = load_float32(folder / f"{model}.weights.safetensors")
    config = GeneratorConfig(
        visibility="causal" if causal else "non_causal",
        ffn=settings["ffn"],
        depth=settings["depth"],
        width=settings["embed_dim"],
        heads=settings["heads"],
        scales=list(meta["patch_nums"]),
        codebook_size=meta["V"],
        code_width=meta["Cvae"],
        text_width=weights["blocks.0.attention_y_norm.weight"].numel(),
        pooled_width=weights["text_pooler.weight"].shape[1],
        crop_condition=settings["use_crop_cond"],
        rope_theta=settings["rope_theta"],
        rope_size=settings["rope_size"],
    )
    transformer = ScaleTransformer(config)
    transformer.load_state_dict({key: value for key, value in weights.items() if key not in BUFFERS})
    return transformer.eval()


def teacher_forced_inputs(io: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Arguments of the transformer's forward pass."""
    crop = center_crop_condition(io["in.batch_height"], io["in.batch_width"])
    mask = io["in.prompt_attn_bias"] == 0
    return io["in.x_BLCv_wo_first_l"], io["in.prompt_embeds"], mask, io["in.pooled"], crop


def _record_outputs(model: ScaleTransformer) -> tuple[dict[str, Tensor], list[Any]]:
    """Hooks that note the outputs which the golden file names."""
    seen: dict[str, Tensor] = {}

    def note(name: str, flat: bool = False) -> Any:
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


def _check_outputs(prefix: str, seen: dict[str, Tensor], io: dict[str, Tensor]) -> list[Check]:
    checks = []
    for key, expected in io.items():
        if key.startswith("out.") and key in seen:
            checks.append(close(f"{prefix}.{key}", seen[key].view_as(expected), expected, FEATURE_TOLERANCE))
    return checks


def _check_buffers(prefix: str, model: ScaleTransformer, io: dict[str, Tensor]) -> list[Check]:
    dense = model.pyramid.dense_mask(model.config.visibility)
    bias = torch.zeros(dense.shape).masked_fill(~dense, -torch.inf)
    checks = [
        equal(f"{prefix}.buffer.attn_bias_for_masking", bias[None, None], io["buffer.attn_bias_for_masking"]),
        equal(f"{prefix}.buffer.lvl_1L", model.level_L[None], io["buffer.lvl_1L"]),
    ]
    if model.config.rope:
        tables = torch.stack([model.cosine_LK[:, ::2], model.sine_LK[:, 1::2]], dim=-1)[None]
        checks.append(close(f"{prefix}.buffer.freqs_cis", tables, io["buffer.freqs_cis"], FEATURE_TOLERANCE))
    return checks


def _check_gradients(
    prefix: str, model: ScaleTransformer, io: dict[str, Tensor], norms: dict[str, Any]
) -> list[Check]:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    checks = []
    for key, expected in io.items():
        kind, _, name = key.partition(".")
        if kind == "grad":
            checks.append(relative(f"{prefix}.{key}", gradients[name], expected, GRADIENT_TOLERANCE))
        elif kind.startswith("grad_cols0_"):
            found = gradients[name]
            columns = int(kind.removeprefix("grad_cols0_"))
            found = None if found is None else found[:, :columns]
            checks.append(relative(f"{prefix}.{key}", found, expected, GRADIENT_TOLERANCE))
    found_norms = {name: g.norm().item() for name, g in gradients.items() if g is not None}
    for check in gradient_norms(found_norms, norms, GRADIENT_TOLERANCE):
        check.quantity = f"{prefix}.{check.quantity}"
        checks.append(check)
    return checks


def check_variant(folder: Path, meta: dict[str, Any], variant: str) -> list[Check]:
    """One of swiglu_nonar, swiglu_ar, gelu_nonar, gelu_ar: buffers, activations, logits, losses, gradients."""
    ffn, attention = variant.rsplit("_", 1)
    prefix, settings = f"switti_{variant}", meta["switti"][variant]
    io = load_float32(folder / f"switti_{ffn}_{attention}.io.safetensors")
    model = load_golden_transformer(folder, meta, f"switti_{ffn}", attention == "ar")
    count = Check(
        f"{prefix}.n_params", sum(p.numel() for p in model.parameters()) - settings["n_params"], 0.0, True
    )
    seen, handles = _record_outputs(model)
    inputs = teacher_forced_inputs(io)
    logits = model(*inputs)
    for handle in handles:
        handle.remove()
    loss = token_losses(logits, io["in.gt_BL"]).mean()
    smooth = token_losses(logits, io["in.gt_BL"], settings["label_smooth"]).mean()
    loss.backward()
    checks = [count, *_check_buffers(prefix, model, io), *_check_outputs(prefix, seen, io)]
    if "out.crop_coords" in io:
        checks.append(equal(f"{prefix}.out.crop_coords", inputs[4], io["out.crop_coords"]))
    checks += [
        close(f"{prefix}.out.logits", logits, io["out.logits"], FEATURE_TOLERANCE),
        close(f"{prefix}.out.loss", loss.view(1), io["out.loss"], LOSS_TOLERANCE),
        close(f"{prefix}.out.loss_label_smooth", smooth.view(1), io["out.loss_label_smooth"], LOSS_TOLERANCE),
    ]
    return checks + _check_gradients(prefix, model, io, settings["grad_l2"])


def check_transformers(folder: Path, meta: dict[str, Any]) -> list[Check]:
    """All variants that meta.json lists."""
    return [check for variant in meta["switti"] for check in check_variant(folder, meta, variant)]
