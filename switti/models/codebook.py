"""Care of a learned codebook: how often codes are chosen, first values, replacement of dead codes.

Shape suffixes: R rows, C code width, V codebook size, S scales, L tokens of all scales, B pictures.
"""

import torch
from torch import Tensor

from switti.scales import Pyramid


def token_counts(tokens_BL: Tensor, pyramid: Pyramid, codebook_size: int) -> Tensor:
    """How often each code is chosen at each scale: int64 [S, V]."""
    parts = pyramid.split(tokens_BL)
    return torch.stack([part.flatten().bincount(minlength=codebook_size) for part in parts])


def entropy(counts_SV: Tensor) -> Tensor:
    """Entropy in nats of the distributions that counts describe, float64 [S]; 0 where nothing was counted.

    It is the cross-entropy of a model that knows each scale's token frequencies and nothing else: what a training loss
    must undercut before it can be said to use the picture or the caption. Its exponential is the perplexity, the
    effective number of codes.
    """
    counts_SV = counts_SV.double()
    shares_SV = counts_SV / counts_SV.sum(-1, keepdim=True).clamp_min(1)
    return -torch.special.xlogy(shares_SV, shares_SV).sum(-1)


def draw_rows(rows_RC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows without repetition, or with it if there are fewer."""
    total = rows_RC.shape[0]
    if count <= total:
        picks = torch.randperm(total, generator=generator)[:count]
    else:
        picks = torch.randint(total, (count,), generator=generator)
    return rows_RC[picks.to(rows_RC.device)]


@torch.no_grad()
def kmeans(rows_RC: Tensor, count: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Centres of Lloyd's algorithm, [count, C]. Empty clusters move to a random row."""
    centres_VC = draw_rows(rows_RC, count, generator).clone()
    for _ in range(iterations):
        nearest_R = torch.cdist(rows_RC, centres_VC).argmin(1)
        sizes_V = nearest_R.bincount(minlength=count)
        sums_VC = torch.zeros_like(centres_VC).index_add_(0, nearest_R, rows_RC)
        centres_VC = sums_VC / sizes_V.clamp_min(1)[:, None]
        empty_V = sizes_V == 0
        centres_VC[empty_V] = draw_rows(rows_RC, int(empty_V.sum()), generator)
    return centres_VC
