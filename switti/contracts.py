"""Protocols by which callbacks, Lightning modules, data modules and loaders speak to each other.

The three layers do not import each other; each relies on the members named here alone. The classes that provide them
stand in `lightning_modules` and `datamodules`, their users in `callbacks`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.text.base import TextEmbedding

# ---- Lightning modules --------------------------------------------------------------------------------------------


@runtime_checkable
class StepGuard(Protocol):
    """The guard that skips optimizer steps with a loss or gradient that is not finite."""

    @property
    def skipped(self) -> bool:
        """Whether the last optimizer step was skipped, on all ranks alike."""


@runtime_checkable
class GuardedModule(Protocol):
    """A module that skips nonfinite optimizer steps."""

    @property
    def nonfinite_guard(self) -> StepGuard:
        """The guard of its steps."""


@runtime_checkable
class EMAModule(Protocol):
    """A module that holds exponential moving averages of its weights, which a callback updates."""

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of (EMA copy, live module); none if no EMA is kept."""


@runtime_checkable
class TokenizedModule(Protocol):
    """A module that works on the tokens of an RQ-VAE."""

    @property
    def tokenizer(self) -> nn.Module:
        """The RQ-VAE; a frozen one is not a registered submodule."""


@runtime_checkable
class GeneratorTraining(Protocol):
    """A module that trains a scale transformer."""

    @property
    def generator(self) -> ScaleTransformer | None:
        """The live transformer; None before `configure_model`."""


@runtime_checkable
class SamplingModule(Protocol):
    """A module that can sample images."""

    def generate(
        self, text: TextEmbedding, null: TextEmbedding, seeds: list[int], sampling: SamplingConfig, /
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], one per row of `text` and seed; `null` has one row for all or one each."""


@runtime_checkable
class ObjectiveModule(Protocol):
    """A module whose training objective can be evaluated on a fixed batch."""

    def prepare_objective(self, batch: dict[str, Any], /) -> Any:
        """What `objective` needs of a batch on the module's device, with all that is random drawn from its seeds."""

    def objective(self, prepared: Any, /) -> Mapping[str, Tensor]:
        """`loss` of the live weights, and further values for the log; nothing is drawn. Every rank must call it."""


# ---- data modules and loaders -------------------------------------------------------------------------------------


@runtime_checkable
class BadSample(Protocol):
    """Something missing or corrupt in the data."""

    @property
    def shard(self) -> str:
        """The shard it belongs to."""

    @property
    def key(self) -> str:
        """The sample's key."""

    @property
    def reason(self) -> str:
        """What is wrong, as a message says it."""

    @property
    def kind(self) -> str:
        """The category under which it is counted."""

    @property
    def samples(self) -> int:
        """How many samples are lost by it, as far as is known."""


@runtime_checkable
class BadSampleReports(Protocol):
    """Reports of one rank's training loader, batch by batch."""

    def claim(self) -> tuple[int, Sequence[BadSample]]:
        """(samples read, bad ones) of the oldest batch not yet claimed: the one just trained on."""

    def judge(self, count: int, read: int, reasons: Mapping[str, str], /) -> None:
        """UserError if `count` bad samples of `read` exceed the limit; reasons: by key, of some of them."""


@runtime_checkable
class TrainingData(Protocol):
    """A data module whose position and bad samples callbacks keep track of."""

    # Set before training: a callback claims and judges the reports of all ranks, and the loader does neither.
    watched: bool

    @property
    def bad_samples(self) -> BadSampleReports | None:
        """Reports of the training loader; None before there is one."""

    @property
    def missing_samples(self) -> Sequence[BadSample]:
        """What was already missing when the training shards were indexed."""

    def advance(self) -> None:
        """Move the position on by one batch of all ranks, before a checkpoint saves it."""


@runtime_checkable
class DescribedData(Protocol):
    """A data module that can say which data it reads."""

    @property
    def contents(self) -> dict[str, dict[str, Any]]:
        """Per split the number of samples and a digest, as the run record keeps them."""


@runtime_checkable
class SplitValidation(Protocol):
    """A data module with several validation splits, each with a loader of its own."""

    @property
    def validation_splits(self) -> Sequence[str]:
        """Their names in the order of the loaders; empty where there is one without a name."""


@runtime_checkable
class WaitingLoader(Protocol):
    """A loader that announces when the next batch is asked for."""

    # Called before each batch is fetched; None: nobody listens.
    waiting: Callable[[], None] | None
