"""How each scale uses the codebook: unigram entropy, share of entries used, perplexity, from counts of tokens.

Shape suffixes: B images, L tokens of all scales, K scales, V codebook entries.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from switti.scales import Pyramid
from switti.tokenizer.codebook import entropy, token_counts


def codebook_use(counts_KV: Tensor) -> Tensor:
    """Share of entries that occur at all, float64 [K] in [0, 1]."""
    return (counts_KV > 0).double().mean(-1)


def perplexity(counts_KV: Tensor) -> Tensor:
    """exp(entropy): the number of equally frequent entries of the same entropy, float64 [K] in [1, V]."""
    return entropy(counts_KV).exp()


class ScaleStatistics(Metric):
    """Counts tokens by scale, summed over processes; the statistics are taken of the sums."""

    full_state_update = False
    counts: Tensor

    def __init__(self, pyramid: Pyramid, codebook_size: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.codebook_size = codebook_size
        self.add_state(
            "counts", torch.zeros(pyramid.count, codebook_size, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, tokens_BL: Tensor) -> None:
        """Adds tokens of all scales, int64 [B, L]."""
        self.counts += token_counts(tokens_BL, self.pyramid, self.codebook_size).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """ "unigram_entropy", "codebook_use", "perplexity", each float64 [K]; "codebook_use_total", a scalar."""
        return {
            "unigram_entropy": entropy(self.counts),
            "codebook_use": codebook_use(self.counts),
            "perplexity": perplexity(self.counts),
            "codebook_use_total": codebook_use(self.counts.sum(0)),
        }
