"""Codebook maintenance: usage counts, k-means initialization, EMA updates, restarts of dead codes.

Shape suffixes: R rows, C code width, V codebook size, S scales, L tokens of all scales, B images.
"""

import torch
from torch import Tensor, nn

from switti.scales import Pyramid


def token_counts(tokens_BL: Tensor, pyramid: Pyramid, codebook_size: int) -> Tensor:
    """How often each code is chosen at each scale: int64 [S, V]."""
    parts = pyramid.split(tokens_BL)
    return torch.stack([part.flatten().bincount(minlength=codebook_size) for part in parts])


def entropy(counts_SV: Tensor) -> Tensor:
    """Entropy in nats of the distributions given by counts, float64 [S]; 0 where nothing was counted.

    It is the cross-entropy of a model that knows each scale's token frequencies and nothing else: the
    training loss of a model that uses the image or the caption lies below it. Its exponential is the perplexity, the
    effective number of codes.
    """
    counts_SV = counts_SV.double()
    shares_SV = counts_SV / counts_SV.sum(-1, keepdim=True).clamp_min(1)
    return -torch.special.xlogy(shares_SV, shares_SV).sum(-1)


def draw_rows(rows_RC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random rows, without replacement unless there are fewer."""
    total = rows_RC.shape[0]
    if count <= total:
        picks = torch.randperm(total, generator=generator)[:count]
    else:
        picks = torch.randint(total, (count,), generator=generator)
    return rows_RC[picks.to(rows_RC.device)]


@torch.no_grad()
def kmeans(rows_RC: Tensor, count: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Centers of Lloyd's algorithm, [count, C]. Empty clusters move to a random row."""
    centers_VC = draw_rows(rows_RC, count, generator).clone()
    for _ in range(iterations):
        nearest_R = torch.cdist(rows_RC, centers_VC).argmin(1)
        sizes_V = nearest_R.bincount(minlength=count)
        sums_VC = torch.zeros_like(centers_VC).index_add_(0, nearest_R, rows_RC)
        centers_VC = sums_VC / sizes_V.clamp_min(1)[:, None]
        empty_V = sizes_V == 0
        centers_VC[empty_V] = draw_rows(rows_RC, int(empty_V.sum()), generator)
    return centers_VC


def sums_by_code(rows_RC: Tensor, tokens_R: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """(how often each code was chosen, float32 [V]; sum of the rows that chose it, float32 [V, C])."""
    sums_VC = rows_RC.new_zeros(codebook_size, rows_RC.shape[1], dtype=torch.float32)
    counts_V = tokens_R.bincount(minlength=codebook_size).float()
    return counts_V, sums_VC.index_add_(0, tokens_R, rows_RC.float())


class CodebookAverage(nn.Module):
    """Codes as moving averages of the rows that choose them (arXiv 1711.00937, appendix A.1), in place of gradients.

    Numerator and denominator decay alike, so that an unused code keeps its value.
    decay: weight of the previous state, in (0, 1). Its buffers are the state of training, not of the tokenizer.
    """

    counts_V: Tensor
    sums_VC: Tensor

    def __init__(self, codes_VC: Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("counts_V", torch.ones(len(codes_VC)))
        self.register_buffer("sums_VC", codes_VC.detach().clone().float())

    @torch.no_grad()
    def update(self, codes_VC: Tensor, counts_V: Tensor, sums_VC: Tensor) -> None:
        """One step: `codes_VC` is changed in place. counts_V, sums_VC: of this step, over all ranks."""
        self.counts_V.lerp_(counts_V, 1 - self.decay)
        self.sums_VC.lerp_(sums_VC, 1 - self.decay)
        chosen_V = counts_V > 0
        codes_VC[chosen_V] = (self.sums_VC[chosen_V] / self.counts_V[chosen_V, None]).to(codes_VC)

    @torch.no_grad()
    def restart(self, which_V: Tensor, codes_RC: Tensor) -> None:
        """Replaced codes restart with one row each."""
        self.counts_V[which_V] = 1.0
        self.sums_VC[which_V] = codes_RC.to(self.sums_VC)
