"""Schema of a run's settings, composed of the dataclasses beside what they configure. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from callbacks.config import CallbacksConfig
from datamodules.config import DataConfig
from lightning_modules.config import LossConfig, OptimizerConfig, TrainerConfig
from lightning_modules.decoder_tuning_config import DecoderTuningConfig
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.errors import UserError
from switti.metrics.config import MetricsConfig
from switti.models.config import GeneratorConfig
from switti.sampling.config import SamplingConfig
from switti.text.config import TextConfig
from switti.tokenizer.config import RQVAEConfig

# NumPy's generators take no larger ones.
_SEEDS = 1 << 32


@dataclass
class RunConfig:
    """All settings of one run."""

    task: Literal["generator", "tokenizer", "decoder"] = "generator"
    """What is trained: the scale transformer, the RQ-VAE, or the RQ-VAE's decoder alone (Section 4.3)."""
    name: str = ""
    """Name of the run and of its folder. Empty: the config file's name."""
    study: str | None = None
    """Name of the folder that holds the run and those that it is compared with. Null: `single`."""
    runs_dir: str = "runs"
    """Folder of all studies."""
    seed: int = 0
    """Seed of initial weights, data order, caption dropout and noise, in [0, 2^32). Runs of one seed that differ in
    model.visibility share all of these."""
    init_from: str | None = None
    """Weights that a generator starts from, for a later training stage: a run, a checkpoint, an exported folder, a file
    or a hub id. Null: random weights. Resuming an interrupted run needs no setting."""
    tokenizer: RQVAEConfig = field(default_factory=RQVAEConfig)
    """The RQ-VAE: images to token maps and back."""
    tokenizer_weights: str | None = None
    """Weights of the frozen tokenizer of a generator, or of the one whose decoder is tuned: a file, a folder, a hub id,
    or `embedded:demo` for the small one that ships with the library."""
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The scale transformer: the variant, its size, and what it is conditioned on."""
    text: TextConfig = field(default_factory=TextConfig)
    """The frozen text encoder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards, batches, captions and embeddings."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning-rate schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The generator's cross-entropy."""
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    """Losses and codebook of RQ-VAE pretraining (task=tokenizer)."""
    decoder: DecoderTuningConfig = field(default_factory=DecoderTuningConfig)
    """Losses of the RQ-VAE decoder's tuning (task=decoder)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Guidance and filters of the sampler."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Metrics of generated images."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """What is measured, drawn and saved during a run, and when it stops."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length, precision, devices and validation."""

    # Not a setting: values that refer to environment variables, as given. They are saved and shown instead of the
    # resolved ones.
    interpolated = cast(Mapping[str, Any], MappingProxyType({}))

    @property
    def run_dir(self) -> Path:
        """runs/<study or "single">/<run>."""
        return Path(self.runs_dir) / (self.study or "single") / self.name

    def validate(self) -> None:
        """Check settings of different groups against each other. Raises UserError naming both."""
        if not 0 <= self.seed < _SEEDS:
            raise UserError(f"seed={self.seed} must lie in [0, {_SEEDS})")
        for ours, theirs in (
            ("model.scales", "tokenizer.scales"),
            ("model.codebook_size", "tokenizer.codebook_size"),
            ("model.code_width", "tokenizer.code_width"),
            ("model.text_width", "text.width"),
            ("model.pooled_width", "text.pooled_width"),
            ("model.crop_base", "data.crop_base"),
        ):
            mine, other = get(self, ours), get(self, theirs)
            if self.task == "generator" and mine != other:
                raise UserError(f"{ours}={mine} must equal {theirs}={other}")
        if self.task == "generator":
            self.sampling.check_model(len(self.model.scales), self.model.depth)
        if self.data.resolution not in (None, self.tokenizer.resolution):
            raise UserError(
                f"data.resolution={self.data.resolution} must be null or {self.tokenizer.resolution} px, the finest of "
                f"tokenizer.scales={self.tokenizer.scales} times its downsampling by {self.tokenizer.downsampling}"
            )
        if self.trainer.cache_latents and self.data.crop == "random":
            raise UserError(
                "trainer.cache_latents needs data.crop=center: the latent of a random crop is not met again"
            )
        if self.data.streamed and self.callbacks.metrics_every and self.metrics.captions == "train":
            raise UserError(
                "metrics.captions=train needs shards on disk, and data.train is a stream; set "
                "metrics.captions=validation, or callbacks.metrics_every=0"
            )
        self.callbacks.objective_dynamics.check_length(
            "callbacks.objective_dynamics", self.task, self.trainer.max_steps
        )
        parts = self.trainer.world_size * self.trainer.accumulate
        if self.data.batch_size % parts:
            raise UserError(
                f"data.batch_size={self.data.batch_size} must be a multiple of "
                f"trainer.devices·num_nodes·accumulate={parts}: it is the batch of one optimizer step"
            )


def get(config: RunConfig, name: str) -> Any:
    """The value of a setting by its dotted name."""
    return reduce(getattr, name.split("."), config)


# Settings that follow others unless a file or the command line sets them. Applied over the dataclass defaults.
LINKS = {
    "model.scales": "${tokenizer.scales}",
    "model.codebook_size": "${tokenizer.codebook_size}",
    "model.code_width": "${tokenizer.code_width}",
    "model.text_width": "${text.width}",
    "model.pooled_width": "${text.pooled_width}",
    "model.crop_base": "${data.crop_base}",
}
