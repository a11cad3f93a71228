"""Settings of training: optimiser, loss and trainer. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from switti.errors import UserError


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay; defaults are the paper's first pretraining stage.

    final_learning_rate is reached at the last step. weight_decay applies to matrices only: biases, gains,
    embeddings of levels and positions, and the crop scales are never decayed.
    """

    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.05
    eps: float = 1e-8

    def validate(self, path: str) -> None:
        if self.learning_rate <= 0 or self.final_learning_rate < 0:
            raise UserError(f"{path}.learning_rate={self.learning_rate} must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{path}.betas={self.betas} must be two numbers in [0, 1)")
        if self.warmup_steps < 0:
            raise UserError(f"{path}.warmup_steps={self.warmup_steps} must not be negative")


@dataclass
class LossConfig:
    """Cross-entropy over all tokens of all scales, each token weighing 1/L.

    latent_noise: σ of z ← √(1−σ²)·z + σ·ε before quantisation, an augmentation of the tokens.
    """

    label_smoothing: float = 0.0
    latent_noise: float = 0.01

    def validate(self, path: str) -> None:
        for name in ("label_smoothing", "latent_noise"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must lie in [0, 1)")


@dataclass
class TrainerConfig:
    """How long, how precise, on what.

    accumulate: micro-batches per optimiser step; the global batch is data.batch_size in any case.
    checkpointing: recompute each block's activations in the backward pass. compile: torch.compile per block.
    strategy: auto is one device, or DDP where devices × num_nodes is more than one. fsdp shards weights, gradients,
      optimiser and average; those of a tokenizer's or decoder's training are whole while a step is computed.
    sharding_size: ranks among which fsdp divides one copy of the model; devices × num_nodes is a multiple of it (null:
      all of them). One node's devices are the usual choice: then only gradients cross between nodes.
    """

    max_steps: int = 1000
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    sharding_size: int | None = None
    accumulate: int = 1
    gradient_clip: float = 1.0
    checkpointing: bool = False
    compile: bool = False
    validate_every: int = 200
    validate_batches: int | None = None
    log_every: int = 10
    deterministic: bool = True

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.devices * self.num_nodes

    def validate(self, path: str) -> None:
        for name in ("max_steps", "devices", "num_nodes", "accumulate", "validate_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{path}.{name}={getattr(self, name)} must be at least 1")
        if self.gradient_clip < 0:
            raise UserError(f"{path}.gradient_clip={self.gradient_clip} must be 0 (off) or positive")
        if self.sharding_size is None:
            return
        if self.strategy != "fsdp":
            raise UserError(f"{path}.sharding_size={self.sharding_size} belongs to {path}.strategy=fsdp")
        if self.sharding_size < 1 or self.world_size % self.sharding_size:
            raise UserError(
                f"{path}.sharding_size={self.sharding_size} must divide "
                f"{path}.devices × {path}.num_nodes={self.world_size}"
            )
