"""Settings of training: optimizer, loss and trainer. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from switti.config_values import AT_LEAST_1, NOT_NEGATIVE, OFF_OR_POSITIVE, check
from switti.errors import UserError
from switti.import_path import check_choice

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay; the defaults are the paper's first pretraining stage."""

    learning_rate: float = 1e-4
    """Peak learning rate, reached after the warm-up; positive. The paper: 1e-4 at 256 px, 1e-5 at 512 px."""
    final_learning_rate: float = 1e-5
    """Learning rate of the last step, for the linear and the cosine schedule."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly from 0.5 % of its peak."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warm-up, until trainer.max_steps."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the gradient's mean and of its square, two numbers in [0, 1)."""
    weight_decay: float = 0.05
    """Weight decay of matrices and convolution kernels; biases, gains, embeddings of levels and positions, and the crop
    scales are not decayed. The release uses 0 to 0.05."""
    eps: float = 1e-8
    """AdamW's term that keeps the denominator from vanishing."""

    def validate(self, path: str) -> None:
        if self.learning_rate <= 0 or self.final_learning_rate < 0:
            raise UserError(f"{path}.learning_rate={self.learning_rate} must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{path}.betas={self.betas} must be two numbers in [0, 1)")
        check(self, path, NOT_NEGATIVE, "warmup_steps")


@dataclass
class LossConfig:
    """Cross-entropy over all tokens of all scales, each token weighing 1/L."""

    label_smoothing: float = 0.0
    """Probability in [0, 1) that is spread evenly over the codebook instead of the target code."""
    latent_noise: float = 0.01
    """σ of the noise on the latent before quantization, z ← √(1 − σ²) · z + σ · ε: an augmentation of the tokens that
    leaves the image almost unchanged. In [0, 1); the paper has 0.01."""

    def validate(self, path: str) -> None:
        below_1 = (lambda value: 0.0 <= value < 1.0, "must lie in [0, 1)")
        check(self, path, below_1, "label_smoothing", "latent_noise")


@dataclass
class TrainerConfig:
    """Length, precision and hardware of a run."""

    max_steps: int = 1000
    """Optimizer steps of the run. With another value a resumed run follows another learning-rate schedule, too."""
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    """`32-true`: everything in float32. `bf16-mixed`: float32 weights, matrix products in bfloat16."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Kind of device; auto is a GPU if there is one."""
    devices: int = 1
    """Devices of a node, one process each."""
    num_nodes: int = 1
    """Number of nodes."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """auto: one device, or DDP on several. fsdp: weights, gradients, optimizer state and EMA are sharded; those of a
    tokenizer or decoder run are unsharded for the duration of a step."""
    sharding_size: int | None = None
    """Ranks that share one copy of the model under fsdp (hybrid sharding); must divide devices · num_nodes. The devices
    of one node are the usual choice: only gradients then cross between nodes. Null: all ranks."""
    accumulate: int = 1
    """Micro-batches per optimizer step; data.batch_size is the batch of all of them together."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient over all parameters; a larger one is scaled down to it. 0: no clipping."""
    checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory, about a third more computation."""
    compile: bool = False
    """torch.compile for each block."""
    attention: Literal["auto", "fused", "products", "varlen"] = "auto"
    """Kernel of self-attention. auto: by device and type. fused: PyTorch's, one call a scale. varlen: all scales in one
    call, on NVIDIA GPUs in bfloat16; auto takes it for a non-causal model where deterministic is false. products:
    matrix products in pieces, for CPUs."""
    cache_latents: bool = False
    """Keep the tokenizer's latents of all images in memory, so that each is encoded once (generator runs): for small
    data without random crops. 2 KB an image at 64 px, 16 KB at 256 px in bfloat16; the same tokens."""
    validate_every: int = 200
    """Optimizer steps between validations."""
    validate_batches: int | None = None
    """Batches that each rank reads in a validation. Null: the whole split."""
    log_every: int = 10
    """Optimizer steps between rows of metrics.csv and points in TensorBoard."""
    deterministic: bool = True
    """Use deterministic kernels where there are any, and warn elsewhere: a run can be repeated bit by bit."""
    loggers: list[str] = field(default_factory=lambda: ["tensorboard", "csv"])
    """tensorboard, csv, wandb, mlflow, or `package.module:Name` of a Lightning Logger (docs/extending.md). csv is the
    run folder's metrics.csv, which reports read: it is written even if it is not listed."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Lightning's profiler of that name; it writes into the run folder's profile/."""
    fast_dev_run: bool | int = False
    """As in Lightning: run this many batches (true: one) of training and of validation with all callbacks, in a scratch
    folder that is removed at the end. Nothing is resumed or logged."""
    limit_train_batches: int | None = None
    """As in Lightning: micro-batches in an epoch, a multiple of accumulate. Null: the training loader has no end. The
    order of samples continues across epochs, so that losses and weights are the same with and without it."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.devices * self.num_nodes

    def validate(self, path: str) -> None:
        counts = ("max_steps", "devices", "num_nodes", "accumulate", "validate_every", "log_every")
        check(self, path, AT_LEAST_1, *counts)
        check(self, path, OFF_OR_POSITIVE, "gradient_clip")
        for name in self.loggers:
            check_choice(f"{path}.loggers", name, LOGGERS)
        if len(set(self.loggers)) != len(self.loggers):
            raise UserError(f"{path}.loggers={self.loggers} names one twice")
        number = (lambda value: value >= 0, "must be true, false or a number of batches")
        check(self, path, number, "fast_dev_run")
        limit = (
            lambda value: value > 0 and value % self.accumulate == 0,
            f"must be a positive multiple of {path}.accumulate={self.accumulate}, or null: an optimizer step must not "
            "be cut short by the end of an epoch",
        )
        check(self, path, limit, "limit_train_batches")
        if self.sharding_size is None:
            return
        if self.strategy != "fsdp":
            raise UserError(f"{path}.sharding_size={self.sharding_size} belongs to {path}.strategy=fsdp")
        if self.sharding_size < 1 or self.world_size % self.sharding_size:
            raise UserError(
                f"{path}.sharding_size={self.sharding_size} must divide "
                f"{path}.devices × {path}.num_nodes={self.world_size}"
            )
