"""A set of prompts with their embeddings and seeds: what callbacks sample again and again to watch a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule
from torch import Tensor

from switti.contracts import SamplingModule
from switti.errors import UserError
from switti.sampling.config import SamplingConfig
from switti.text.base import TextEmbedding


@dataclass(frozen=True)
class PromptSet:
    """Captions under fixed noise: the same at every sampling and in every run, so that only the model differs.

    text: one row per prompt. null: the null caption, one row. seeds: one per prompt.
    """

    prompts: list[str]
    text: TextEmbedding
    null: TextEmbedding
    seeds: list[int]
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.text) == len(self.seeds):
            raise UserError(
                f"a prompt set needs as many captions ({len(self.prompts)}) as embeddings ({len(self.text)}) "
                f"and seeds ({len(self.seeds)})"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def generate(
        self,
        module: LightningModule,
        rows: Sequence[int] | None = None,
        sampling: SamplingConfig | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of these rows (default: all), with these settings (default: the set's)."""
        assert isinstance(module, SamplingModule)
        chosen = list(range(len(self)) if rows is None else rows)
        seeds = [self.seeds[row] for row in chosen]
        return module.generate(self.text[chosen], self.null, seeds, sampling or self.sampling)
