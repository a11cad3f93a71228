"""Golden check of five optimizer steps: AdamW, clipping and the schedule together."""

import torch

from benchmarks.parity.common import FEATURE_TOLERANCE, LOSS_TOLERANCE, Check, Golden, Settings, TensorFile
from benchmarks.parity.functions import schedule_factor
from benchmarks.parity.transformer import golden_tokens, load_golden_transformer, teacher_forced_inputs
from switti.losses.cross_entropy import token_losses

RELATIVE_NORM_TOLERANCE = 1e-4
# A golden trajectory has a handful.
STEPS = 1000
# Parameters that the format stores after the last step; of all others it stores the norm.
STORED = (
    "blocks.0.attn.to_qkv.bias", "blocks.0.attn.to_qkv.weight", "blocks.0.crop_cond_scales",
    "blocks.1.ffn.down_proj.weight", "blocks.1.ffn_norm1.weight", "crop_embed.weight", "head.weight",
    "lvl_embed.weight", "pos_start", "word_embed.weight",
)  # fmt: skip


def _optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in group["names"]],
            "weight_decay": settings["wd"] * group["wd_sc"],
        }
        for group in settings["groups"]
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(settings["betas"]), eps=settings["eps"])


def check_trajectory(golden: Golden) -> None:
    """Loss, gradient norm and learning rate of every step, then the parameters."""
    settings = golden.meta["trajectory"]
    final = golden.tensors("trajectory.safetensors", "trajectory.")
    with golden.part("trajectory"):
        name, variant = settings["model"].split()
        io = golden.tensors(f"{name}_{variant}.io.safetensors", f"{name}_{variant}.")
        model = load_golden_transformer(golden, name, variant == "ar").train()
        _check_steps(golden, settings, model, io)
        parameters = dict(model.named_parameters())
        named = {f"final.{key}" for key in STORED if key in parameters}
        for key in sorted(named | set(final.starting("final."))):
            if key.removeprefix("final.") in parameters:
                final.close(key, parameters[key.removeprefix("final.")], FEATURE_TOLERANCE)
        norms = golden.wanted(settings, "final_param_l2") or Settings({}, settings.name("final_param_l2"))
        for key, parameter in parameters.items():
            if (expected := golden.wanted(norms, key)) is not None:
                deviation = abs(parameter.norm().item() - expected) / max(expected, 1e-12)
                golden.add(Check(f"trajectory.final_param_l2.{key}", deviation, RELATIVE_NORM_TOLERANCE))
    final.finish()


def _check_steps(golden: Golden, settings: Settings, model: torch.nn.Module, io: TensorFile) -> None:
    optimizer, inputs = _optimizer(model, settings), teacher_forced_inputs(io)
    tokens = golden_tokens(io, len(golden.meta["patch_nums"]))
    listed = {step["it"]: step for step in settings["steps"]}
    if not all(type(it) is int and 0 <= it < STEPS for it in listed):
        raise ValueError(f"{settings.name('steps')} must count from 0 to at most {STEPS}")
    for it in range(max(listed, default=-1) + 1):
        rate = settings["peak_lr"] * schedule_factor(
            settings["schedule"],
            it,
            settings["warmup"],
            settings["max_iters"],
            settings["wp0"],
            settings["wpe"],
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = token_losses(model(*inputs), tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        step, tag = listed.get(it, Settings({}, settings.name(f"steps.{it}"))), f"trajectory.step.{it}"
        if (expected := golden.wanted(step, "lr")) is not None:
            golden.add(Check(f"{tag}.lr", abs(rate - expected), 1e-12))
        if (expected := golden.wanted(step, "loss")) is not None:
            golden.add(Check(f"{tag}.loss", abs(loss.item() - expected), LOSS_TOLERANCE * 10))
        if (expected := golden.wanted(step, "grad_norm_before_clip")) is not None:
            golden.add(Check(f"{tag}.grad_norm", abs(norm.item() / expected - 1), RELATIVE_NORM_TOLERANCE))
