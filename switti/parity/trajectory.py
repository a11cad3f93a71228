"""Golden check of five optimiser steps: AdamW, clipping and the schedule together."""

from pathlib import Path
from typing import Any

import torch

from switti.losses import token_losses
from switti.parity.common import FEATURE_TOLERANCE, LOSS_TOLERANCE, Check, close, load_float32
from switti.parity.functions import schedule_factor
from switti.parity.transformer import load_golden_transformer, teacher_forced_inputs

RELATIVE_NORM_TOLERANCE = 1e-4


def _optimizer(model: torch.nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in group["names"]],
            "weight_decay": settings["wd"] * group["wd_sc"],
        }
        for group in settings["groups"]
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(settings["betas"]), eps=settings["eps"])


def check_trajectory(folder: Path, meta: dict[str, Any]) -> list[Check]:
    """Loss, gradient norm and learning rate of every step, then the parameters."""
    settings = meta["trajectory"]
    name, variant = settings["model"].split()
    io = load_float32(folder / f"{name}_{variant}.io.safetensors")
    model = load_golden_transformer(folder, meta, name, variant == "ar").train()
    optimizer = _optimizer(model, settings)
    inputs, checks = teacher_forced_inputs(io), []
    for step in settings["steps"]:
        rate = settings["peak_lr"] * schedule_factor(
            settings["schedule"],
            step["it"],
            settings["warmup"],
            settings["max_iters"],
            settings["wp0"],
            settings["wpe"],
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = token_losses(model(*inputs), io["in.gt_BL"]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        tag = f"trajectory.step.{step['it']}"
        checks += [
            Check(f"{tag}.lr", abs(rate - step["lr"]), 1e-12),
            Check(f"{tag}.loss", abs(loss.item() - step["loss"]), LOSS_TOLERANCE * 10),
            Check(
                f"{tag}.grad_norm",
                abs(norm.item() / step["grad_norm_before_clip"] - 1),
                RELATIVE_NORM_TOLERANCE,
            ),
        ]
    parameters = dict(model.named_parameters())
    for key, expected in load_float32(folder / "trajectory.safetensors").items():
        found = parameters[key.removeprefix("final.")]
        checks.append(close(f"trajectory.{key}", found, expected, FEATURE_TOLERANCE))
    for key, expected_norm in settings["final_param_l2"].items():
        deviation = abs(parameters[key].norm().item() - expected_norm) / max(expected_norm, 1e-12)
        checks.append(Check(f"trajectory.final_param_l2.{key}", deviation, RELATIVE_NORM_TOLERANCE))
    return checks
