"""Every setting of a run, composed from the dataclasses that live beside what they configure. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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

_SEEDS = 1 << 32  # what NumPy's generators take


@dataclass
class RunConfig:
    """One run. name: its folder (empty: the config file's name). study: the folder above it (null: "single").

    tokenizer_weights: file of the frozen tokenizer, or "embedded:demo". init_from: checkpoint whose weights are
    loaded before step 0 (a later training stage); resuming needs no setting.
    """

    task: Literal["generator", "tokenizer", "decoder"] = "generator"
    name: str = ""
    study: str | None = None
    runs_dir: str = "runs"
    seed: int = 0
    init_from: str | None = None
    tokenizer: RQVAEConfig = field(default_factory=RQVAEConfig)
    tokenizer_weights: str | None = None
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tokenizer_loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    decoder: DecoderTuningConfig = field(default_factory=DecoderTuningConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    # Not a setting: what refers to the environment, as it was given. It is stored and shown in place of the values.
    interpolated = cast(Mapping[str, Any], MappingProxyType({}))

    @property
    def run_dir(self) -> Path:
        """runs/<study or "single">/<run>."""
        return Path(self.runs_dir) / (self.study or "single") / self.name

    def validate(self) -> None:
        """What concerns more than one group. Raises UserError naming both settings."""
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
            mine, other = _get(self, ours), _get(self, theirs)
            if self.task == "generator" and mine != other:
                raise UserError(f"{ours}={mine} must equal {theirs}={other}")
        if self.data.resolution not in (None, self.tokenizer.resolution):
            raise UserError(
                f"data.resolution={self.data.resolution} must be null or {self.tokenizer.resolution} px, the finest of "
                f"tokenizer.scales={self.tokenizer.scales} times its down-sampling by {self.tokenizer.downsampling}"
            )
        if self.data.streamed and self.callbacks.metrics_every and self.metrics.captions == "train":
            raise UserError(
                "metrics.captions=train needs shards on disk, and data.train is a stream; set "
                "metrics.captions=validation, or callbacks.metrics_every=0"
            )
        parts = self.trainer.world_size * self.trainer.accumulate
        if self.data.batch_size % parts:
            raise UserError(
                f"data.batch_size={self.data.batch_size} must be a multiple of "
                f"trainer.devices·num_nodes·accumulate={parts}: it is the batch of one optimiser step"
            )


def _get(config: RunConfig, name: str) -> Any:
    group, setting = name.split(".")
    return getattr(getattr(config, group), setting)


# Settings that follow others unless a file or the command line sets them. Applied over the dataclass defaults.
LINKS = {
    "model.scales": "${tokenizer.scales}",
    "model.codebook_size": "${tokenizer.codebook_size}",
    "model.code_width": "${tokenizer.code_width}",
    "model.text_width": "${text.width}",
    "model.pooled_width": "${text.pooled_width}",
    "model.crop_base": "${data.crop_base}",
}
