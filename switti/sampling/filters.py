"""From logits to tokens: top-k, top-p and draws, in float32.

Shape suffixes: B batch, P tokens of a scale, V vocabulary, K kept candidates.
"""

import torch
from torch import Tensor


def keep_candidates(logits_BPV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """Logits that survive top-k and then top-p, the others −inf, in ascending order where anything was cut.

    top_k: keep logits not below the k-th largest, ties included (0 or at least V: all). top_p: of what is left, drop
    the smallest whose ascending cumulative probability is at most 1 − top_p; the largest always stays (0: no cut).

    Returns (candidates [B, P, K], token of each candidate [B, P, K], or None when candidate i is token i).
    Top-k comes first, so that sorting and accumulating run over k candidates and not over the vocabulary.
    """
    size = logits_BPV.shape[-1]
    count = top_k if 0 < top_k < size else size
    if count == size and top_p == 0.0:
        return logits_BPV, None
    values, tokens = _largest(logits_BPV, count)
    if top_p == 0.0:
        return values, tokens
    dropped = _below_nucleus(values, top_p)
    smallest = values.masked_fill(dropped, torch.inf).amin(dim=-1, keepdim=True)
    ambiguous = (dropped & (values == smallest)).any(dim=-1)
    if bool(ambiguous.any()):
        # The cut falls between equal logits. Which of them goes is the sort's choice, as in the published sampler.
        kept = values.shape[-1]
        floor = (
            values[ambiguous].masked_fill(values[ambiguous] == -torch.inf, torch.inf).amin(-1, keepdim=True)
        )
        rows = logits_BPV[ambiguous]
        sorted_values, order = rows.masked_fill(rows < floor, -torch.inf).sort(dim=-1)
        values[ambiguous], tokens[ambiguous] = sorted_values[:, -kept:], order[:, -kept:]
        dropped[ambiguous] = _below_nucleus(values[ambiguous], top_p)
    return values.masked_fill(dropped, -torch.inf), tokens


def _largest(logits_BPV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits in ascending order; more candidates where ties with the smallest of them exist."""
    values, tokens = logits_BPV.topk(count, dim=-1)
    threshold = values[..., -1:]
    with_ties = int((logits_BPV >= threshold).sum(dim=-1).amax())
    if with_ties > count:
        values, tokens = logits_BPV.topk(with_ties, dim=-1)
        values = values.masked_fill(values < threshold, -torch.inf)
    return values.flip(-1), tokens.flip(-1)


def _below_nucleus(values_BPK: Tensor, top_p: float) -> Tensor:
    """Mask of the candidates, in ascending order, that top-p drops."""
    dropped = values_BPK.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    dropped[..., -1] = False
    return dropped


def filtered_probabilities(logits_BPV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities over the whole vocabulary after both cuts."""
    values, tokens = keep_candidates(logits_BPV, top_k, top_p)
    probabilities = values.softmax(dim=-1)
    if tokens is None:
        return probabilities
    return torch.zeros_like(logits_BPV).scatter(-1, tokens, probabilities)


def draw_tokens(logits_BPV: Tensor, top_k: int, top_p: float, noise_BPV: Tensor | None) -> Tensor:
    """One token a position, int64 [B, P].

    noise_BPV: Exp(1) draws; the token is argmax of probability / noise, a draw from the filtered distribution.
    None stands for the most probable token.
    """
    if noise_BPV is None:
        return logits_BPV.argmax(dim=-1)
    values, tokens = keep_candidates(logits_BPV, top_k, top_p)
    if tokens is None:
        return (values.softmax(dim=-1) / noise_BPV).argmax(dim=-1)
    winner = (values.softmax(dim=-1) / noise_BPV.gather(-1, tokens)).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, winner).squeeze(-1)


def gumbel_temperature(ratio: float) -> float:
    """Temperature τ = max(0.27·(1 − 0.95·r), 0.005) of the soft mixture at progress r in [0, 1]."""
    return max(0.27 * (1.0 - 0.95 * ratio), 0.005)


def gumbel_softmax(logits_BPV: Tensor, noise_BPV: Tensor, temperature: float) -> Tensor:
    """softmax((logits − log e)/τ) with Exp(1) draws e: a soft one-hot token."""
    return ((logits_BPV - noise_BPV.log()) / temperature).softmax(dim=-1)
