"""From logits to tokens: top-k, top-p and draws, in float32.

Nothing is sorted but the k largest values of a row; tokens are compared with the smallest value that stays.

Shape suffixes: B batch, P tokens of a scale, V vocabulary, R rows, K largest values of a row.
"""

import numpy as np
import torch
from torch import Tensor

# Rows that are handled at a time on a CPU, so that their logits stay in its cache.
ROWS = 256


def kept_tokens(logits_RV: Tensor, top_k: int, top_p: float, rounded: bool = False) -> Tensor:
    """1 where a token survives top-k and then top-p, else 0, in the logits' type.

    top_k: keep logits not below the k-th largest, ties included (0 or at least V: all). top_p: of what is left, drop
    the smallest whose ascending cumulative probability is at most 1 − top_p; the largest always stays (0: no cut).
    Where the second cut falls between equal logits, it is torch.sort's choice which of them go, as published. Logits
    that were rounded to half precision are often equal: with `rounded`, tokens with lower numbers go first instead,
    which needs no sort.
    """
    size = logits_RV.shape[-1]
    count = top_k if 0 < top_k < size else size
    if top_p == 0.0:
        return logits_RV.clone().ge_(_largest(logits_RV, count)[:, :1])
    values_RK = _largest_with_ties(logits_RV, count)
    dropped_RK = values_RK.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    dropped_RK[:, -1] = False
    floor_R1 = values_RK.gather(-1, dropped_RK.sum(dim=-1, keepdim=True))
    kept_RV = logits_RV.clone().ge_(floor_R1)
    surplus_R1 = (dropped_RK & (values_RK == floor_R1)).sum(dim=-1, keepdim=True)
    split_R = surplus_R1.squeeze(-1) > 0
    if bool(split_R.any()):
        kept_RV[split_R] = _split_ties(
            logits_RV[split_R], kept_RV[split_R], floor_R1[split_R], surplus_R1[split_R], top_k, rounded
        )
    return kept_RV


def _split_ties(
    logits_RV: Tensor, kept_RV: Tensor, floor_R1: Tensor, surplus_R1: Tensor, top_k: int, rounded: bool
) -> Tensor:
    """`kept_RV` without `surplus_R1` of the tokens whose logit equals `floor_R1`."""
    tied_RV = logits_RV == floor_R1
    if rounded:
        return kept_RV * ~(tied_RV & (tied_RV.cumsum(dim=-1) <= surplus_R1))
    if 0 < top_k < logits_RV.shape[-1]:
        threshold_R1 = _largest(logits_RV, top_k)[:, :1]
        logits_RV = logits_RV.masked_fill(logits_RV < threshold_R1, -torch.inf)
    order_RV = logits_RV.sort(dim=-1).indices
    tied_in_order = tied_RV.gather(-1, order_RV)
    goes = tied_in_order & (tied_in_order.cumsum(dim=-1) <= surplus_R1)
    return kept_RV * ~torch.zeros_like(goes).scatter(-1, order_RV, goes)


def _largest(logits_RV: Tensor, count: int) -> Tensor:
    """The `count` largest logits of each row in ascending order, [R, K]."""
    if logits_RV.device.type != "cpu":
        return logits_RV.topk(count, dim=-1).values.flip(-1)
    # NumPy's selection and sort are vectorised; torch.topk takes twelve times as long on a CPU.
    rest = logits_RV.shape[-1] - count
    values = np.partition(logits_RV.numpy(), rest, axis=-1)[:, rest:] if rest else logits_RV.numpy()
    return torch.from_numpy(np.sort(values, axis=-1))


def _largest_with_ties(logits_RV: Tensor, count: int) -> Tensor:
    """`_largest`; where others equal the smallest of them, these too, and −inf in front in the other rows."""
    values_RK = _largest(logits_RV, count)
    threshold_R1 = values_RK[:, :1]
    if count == logits_RV.shape[-1]:
        return values_RK
    with_ties = int((logits_RV >= threshold_R1).sum(dim=-1).amax())
    if with_ties == count:
        return values_RK
    values_RK = _largest(logits_RV, with_ties)
    return values_RK.masked_fill(values_RK < threshold_R1, -torch.inf)


def filtered_probabilities(logits_BPV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities over the whole vocabulary after both cuts."""
    rows_RV = logits_BPV.flatten(0, -2)
    kept_RV = kept_tokens(rows_RV, top_k, top_p)
    return rows_RV.masked_fill(kept_RV == 0, -torch.inf).softmax(dim=-1).view_as(logits_BPV)


def draw_tokens(
    logits_BPV: Tensor, top_k: int, top_p: float, noise_BPV: Tensor | None, rounded: bool = False
) -> Tensor:
    """One token a position, int64 [B, P].

    rounded: the logits come from a model in half precision, see `kept_tokens`.

    noise_BPV: Exp(1) draws above 0; the token is argmax of probability / noise, a draw from the filtered distribution.
    None stands for the most probable token.
    """
    if noise_BPV is None:
        return logits_BPV.argmax(dim=-1)
    logits_RV, noise_RV = logits_BPV.flatten(0, -2), noise_BPV.flatten(0, -2)
    step = ROWS if logits_RV.device.type == "cpu" else len(logits_RV)
    drawn = [
        _draw(logits, top_k, top_p, noise, rounded)
        for logits, noise in zip(logits_RV.split(step), noise_RV.split(step), strict=True)
    ]
    return torch.cat(drawn).view(logits_BPV.shape[:-1])


def _draw(logits_RV: Tensor, top_k: int, top_p: float, noise_RV: Tensor, rounded: bool) -> Tensor:
    odds_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).exp_().div_(noise_RV)
    if 0 < top_k < logits_RV.shape[-1] or top_p > 0.0:
        odds_RV.mul_(kept_tokens(logits_RV, top_k, top_p, rounded))
    return odds_RV.argmax(dim=-1)


def gumbel_temperature(ratio: float) -> float:
    """Temperature τ = max(0.27·(1 − 0.95·r), 0.005) of the soft mixture at progress r in [0, 1]."""
    return max(0.27 * (1.0 - 0.95 * ratio), 0.005)


def gumbel_softmax(logits_BPV: Tensor, noise_BPV: Tensor, temperature: float) -> Tensor:
    """softmax((logits − log e)/τ) with Exp(1) draws e: a soft one-hot token."""
    return ((logits_BPV - noise_BPV.log()) / temperature).softmax(dim=-1)
