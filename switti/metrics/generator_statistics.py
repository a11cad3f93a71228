"""Validation metrics of a generator, per scale. Shape suffixes: B images, L tokens, N scales, V vocabulary."""

import torch
from torch import Tensor
from torchmetrics import Metric

from switti.scales import Pyramid
from switti.tokenizer.codebook import entropy, token_counts


class GeneratorStatistics(Metric):
    """Sums over images and ranks; `compute` gives means.

    Keys: loss (all tokens alike, nats), loss_by_scale/<k>, accuracy_by_scale/<k>, unigram_entropy_by_scale/<k> (nats:
    the loss of a model that knows each scale's token frequencies alone) and codebook_use.
    """

    full_state_update = False
    losses_N: Tensor
    correct_N: Tensor
    counts_NV: Tensor

    def __init__(self, pyramid: Pyramid, codebook_size: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        scales = pyramid.count
        self.add_state("losses_N", torch.zeros(scales, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("correct_N", torch.zeros(scales, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(
            "counts_NV", torch.zeros(scales, codebook_size, dtype=torch.float64), dist_reduce_fx="sum"
        )

    def update(self, tokens_BL: Tensor, losses_BL: Tensor, correct_BL: Tensor) -> None:
        self.counts_NV += token_counts(tokens_BL, self.pyramid, self.counts_NV.shape[1])
        for state, values in ((self.losses_N, losses_BL), (self.correct_N, correct_BL)):
            state += torch.stack([part.double().sum() for part in self.pyramid.split(values)])

    def compute(self) -> dict[str, Tensor]:
        numbers_N = self.counts_NV.sum(dim=1)
        per_scale = {
            "loss_by_scale": self.losses_N / numbers_N,
            "accuracy_by_scale": self.correct_N / numbers_N,
            "unigram_entropy_by_scale": entropy(self.counts_NV),
        }
        values = {"loss": self.losses_N.sum() / numbers_N.sum()}
        values |= {f"{name}/{k}": value for name, row in per_scale.items() for k, value in enumerate(row)}
        values["codebook_use"] = (self.counts_NV.sum(dim=0) > 0).double().mean()
        return {name: value.float() for name, value in values.items()}
