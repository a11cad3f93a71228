"""AdamW with two parameter groups and a per-step schedule."""

from typing import Any

import torch
from torch import nn

from lightning_modules.config import OptimizerConfig
from lightning_modules.schedule import warmup_decay

# Parameters of two or more dimensions that are not matrices of a linear map: embeddings and gates.
UNDECAYED = ("pos_start", "lvl_embed", "pos_1LC", "crop_cond_scales")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and kernels only."""
    return parameter.ndim >= 2 and not any(part in name for part in UNDECAYED)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decayed and undecayed trainable parameters of `module`, in the order of its names."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if is_decayed(name, p)]
    others = [p for name, p in named if not is_decayed(name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, max_steps: int
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """AdamW over `module` and Lightning's scheduler entry (per step)."""
    optimizer = torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )

    def factor(step: int) -> float:
        return warmup_decay(
            step,
            warmup=config.warmup_steps,
            total=max_steps,
            shape=config.schedule,
            final=config.final_learning_rate / config.learning_rate,
        )

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return optimizer, {"scheduler": scheduler, "interval": "step", "frequency": 1}
