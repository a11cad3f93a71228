"""How each scale uses the codebook: unigram entropy, share of entries used, perplexity, from counts of tokens.

Shape suffixes: B pictures, L tokens of all scales, K scales, V codebook entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def count_by_scale(tokens_BL: Tensor, spans: Sequence[tuple[int, int]], codebook_size: int) -> Tensor:
    """Occurrences of each entry at each scale, int64 [K, V]. spans: (start, stop) of each scale in L."""
    return torch.stack(
        [
            torch.bincount(tokens_BL[:, start:stop].reshape(-1), minlength=codebook_size)
            for start, stop in spans
        ]
    )


def unigram_entropy(counts_KV: Tensor) -> Tensor:
    """Entropy in nats of the empirical distribution, float64 [K] in [0, ln V]; nan for a scale without tokens.

    The cross-entropy of a model that knows each scale's token frequencies and nothing else: what a training loss
    must undercut before it can be said to use the picture or the caption.
    """
    probability = counts_KV.double() / counts_KV.sum(-1, keepdim=True)
    return -torch.special.xlogy(probability, probability).sum(-1)


def codebook_use(counts_KV: Tensor) -> Tensor:
    """Share of entries that occur at all, float64 [K] in [0, 1]."""
    return (counts_KV > 0).double().mean(-1)


def perplexity(counts_KV: Tensor) -> Tensor:
    """exp(entropy): the number of equally frequent entries of the same entropy, float64 [K] in [1, V]."""
    return unigram_entropy(counts_KV).exp()


class ScaleStatistics(Metric):
    """Counts tokens by scale, summed over processes; the statistics are taken of the sums."""

    full_state_update = False
    counts: Tensor

    def __init__(self, spans: Sequence[tuple[int, int]], codebook_size: int) -> None:
        super().__init__()
        self.spans = tuple(spans)
        self.codebook_size = codebook_size
        self.add_state(
            "counts", torch.zeros(len(self.spans), codebook_size, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, tokens_BL: Tensor) -> None:
        """Adds tokens of all scales, int64 [B, L]."""
        self.counts += count_by_scale(tokens_BL, self.spans, self.codebook_size).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """ "unigram_entropy", "codebook_use", "perplexity", each float64 [K]; "codebook_use_total", a scalar."""
        return {
            "unigram_entropy": unigram_entropy(self.counts),
            "codebook_use": codebook_use(self.counts),
            "perplexity": perplexity(self.counts),
            "codebook_use_total": codebook_use(self.counts.sum(0)),
        }
