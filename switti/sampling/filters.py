"""Top-k and top-p filtering and sampling of tokens, in float32.

On a CPU nothing is sorted but the k largest values of a row, and noise is made for the tokens that stay. On other
devices every step is a tensor operation of static shape without a host in between: the published formulation.

Shape suffixes: B images, P tokens of a scale, V codebook entries, R rows, K largest values, S tokens that stay.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from switti.sampling.noise import ScaleNoise

# Rows that are handled at a time on a CPU, so that their logits stay in its cache.
ROWS = 256


def kept_tokens(logits_RV: Tensor, top_k: int, top_p: float, rounded: bool = False) -> Tensor:
    """Whether a token survives top-k and then top-p, bool [R, V].

    top_k: keep logits not below the k-th largest, ties included (0 or at least V: all). top_p: of what is left, drop
    the smallest whose ascending cumulative probability is at most 1 − top_p; the largest always stays (0: no cut).
    Where the second cut falls between equal logits, it is torch.sort's choice which of them go, as published. Logits
    that were rounded to bfloat16 are often equal: with `rounded`, tokens with lower numbers go first instead, which
    needs no sort.
    """
    if logits_RV.device.type != "cpu":
        return _kept_on_device(logits_RV, top_k, top_p, rounded)
    kept_RV = np.zeros(tuple(logits_RV.shape), dtype=bool)
    kept_RV.reshape(-1)[_kept_on_cpu(logits_RV, top_k, top_p, rounded)[0]] = True
    return torch.from_numpy(kept_RV)


def _kept_on_device(logits_RV: Tensor, top_k: int, top_p: float, rounded: bool) -> Tensor:
    """`kept_tokens` by one sort of each row; in a stable one, tokens with lower numbers come first among equals."""
    size = logits_RV.shape[-1]
    kept_RV = torch.ones_like(logits_RV, dtype=torch.bool)
    if 0 < top_k < size:
        kept_RV = logits_RV >= logits_RV.topk(top_k, dim=-1).values[:, -1:]
    if top_p == 0.0:
        return kept_RV
    ascending = logits_RV.masked_fill(~kept_RV, -torch.inf).sort(dim=-1, stable=rounded)
    stays_RV = ascending.values.softmax(dim=-1).cumsum(dim=-1) > 1.0 - top_p
    stays_RV[:, -1] = True
    return kept_RV & torch.zeros_like(kept_RV).scatter(-1, ascending.indices, stays_RV)


def _kept_on_cpu(logits_RV: Tensor, top_k: int, top_p: float, rounded: bool) -> tuple[np.ndarray, np.ndarray]:
    """(places r·V + v of the tokens that stay in ascending order [S], largest logit of each row [R, 1])."""
    x_RV = logits_RV.numpy()
    size = x_RV.shape[-1]
    count = top_k if 0 < top_k < size else size
    # NumPy's selection and sort are vectorised; torch.topk takes twelve times as long on a CPU.
    values_RK = np.partition(x_RV, size - count, axis=-1)[:, size - count :] if count < size else x_RV
    if top_p == 0.0:
        return np.flatnonzero(x_RV >= values_RK.min(axis=-1, keepdims=True)), x_RV.max(axis=-1, keepdims=True)
    values_RK = np.sort(values_RK, axis=-1)
    largest_R1, floor_R1 = values_RK[:, -1:], values_RK[:, :1]
    # Others that equal the k-th largest precede it in ascending order, as if they had been selected too.
    ties_R1 = np.count_nonzero(x_RV == floor_R1, axis=-1, keepdims=True)
    ties_R1 = ties_R1 - np.count_nonzero(values_RK == floor_R1, axis=-1, keepdims=True)
    odds_RK = np.exp(values_RK - largest_R1)
    tied_odds_R1 = ties_R1.astype(x_RV.dtype) * odds_RK[:, :1]
    cumulative_RK = np.cumsum(odds_RK, axis=-1) + tied_odds_R1
    dropped_RK = cumulative_RK <= (1.0 - top_p) * cumulative_RK[:, -1:]
    dropped_RK[:, -1] = False
    floor_R1 = np.take_along_axis(values_RK, dropped_RK.sum(axis=-1, keepdims=True), axis=-1)
    places_S = np.flatnonzero(x_RV >= floor_R1)
    # Number of dropped tokens among those equal to the smallest one kept.
    surplus_R1 = np.count_nonzero(dropped_RK & (values_RK == floor_R1), axis=-1, keepdims=True)
    # Odds that have underflowed to 0 permit any number.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        fitting_R1 = np.floor((1.0 - top_p) * cumulative_RK[:, -1:] / odds_RK[:, :1])
    fitting_R1 = np.fmin(fitting_R1, ties_R1)
    surplus_R1 = surplus_R1 + np.where(floor_R1 == values_RK[:, :1], fitting_R1, 0).astype(np.int64)
    if surplus_R1.any():
        places_S = _split_ties(logits_RV, places_S, floor_R1, surplus_R1, top_k, rounded)
    return places_S, largest_R1


def _split_ties(
    logits_RV: Tensor,
    places_S: np.ndarray,
    floor_R1: np.ndarray,
    surplus_R1: np.ndarray,
    top_k: int,
    rounded: bool,
) -> np.ndarray:
    """`places_S` without `surplus_R1` of each row's tokens whose logit equals `floor_R1`."""
    size = logits_RV.shape[-1]
    rows_S = places_S // size
    tied_S = logits_RV.numpy().reshape(-1)[places_S] == floor_R1[rows_S, 0]
    if rounded:
        number_S = np.cumsum(tied_S)
        starts_R = np.searchsorted(places_S, np.arange(len(floor_R1)) * size)
        before_R = np.concatenate([[0], number_S])[starts_R]
        return places_S[~(tied_S & (number_S - before_R[rows_S] <= surplus_R1[rows_S, 0]))]
    split = np.flatnonzero(surplus_R1[:, 0])
    some_RV = logits_RV[torch.from_numpy(split)]
    tied_RV = some_RV == torch.from_numpy(floor_R1[split])
    if 0 < top_k < size:
        threshold = np.partition(some_RV.numpy(), size - top_k, axis=-1)[:, size - top_k, None]
        some_RV = some_RV.masked_fill(some_RV < torch.from_numpy(threshold), -torch.inf)
    order_RV = some_RV.sort(dim=-1).indices
    tied_in_order = tied_RV.gather(-1, order_RV)
    goes = tied_in_order & (tied_in_order.cumsum(dim=-1) <= torch.from_numpy(surplus_R1[split]))
    rows, columns = torch.zeros_like(goes).scatter(-1, order_RV, goes).numpy().nonzero()
    return places_S[~np.isin(places_S, split[rows] * size + columns, assume_unique=True)]


def filtered_probabilities(logits_BPV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities over the whole vocabulary after both cuts."""
    rows_RV = logits_BPV.flatten(0, -2)
    kept_RV = kept_tokens(rows_RV, top_k, top_p)
    return rows_RV.masked_fill(~kept_RV, -torch.inf).softmax(dim=-1).view_as(logits_BPV)


def draw_tokens(
    logits_BPV: Tensor,
    top_k: int,
    top_p: float,
    noise: Tensor | ScaleNoise | None,
    rounded: bool = False,
) -> Tensor:
    """One token a position, int64 [B, P].

    noise: Exp(1) draws above 0, [B, P, V] or made when they are needed; the token is argmax of probability / noise, a
    draw from the filtered distribution. None selects the most probable token. rounded: the logits come from a
    bfloat16 model, see `kept_tokens`.
    """
    if noise is None:
        return logits_BPV.argmax(dim=-1)
    if logits_BPV.device.type != "cpu":
        noise_BPV = noise if isinstance(noise, Tensor) else noise.all()
        kept_RV = kept_tokens(logits_BPV.flatten(0, -2), top_k, top_p, rounded)
        odds_BPV = (logits_BPV - logits_BPV.amax(dim=-1, keepdim=True)).exp() / noise_BPV
        return odds_BPV.masked_fill(~kept_RV.view_as(odds_BPV), -1.0).argmax(dim=-1)
    blocks = [
        (image, start, min(start + ROWS, logits_BPV.shape[1]))
        for image in range(logits_BPV.shape[0])
        for start in range(0, logits_BPV.shape[1], ROWS)
    ]

    def draw(block: tuple[int, int, int]) -> np.ndarray:
        image, start, stop = block
        places_S, largest_R1 = _kept_on_cpu(logits_BPV[image, start:stop], top_k, top_p, rounded)
        return _draw(
            logits_BPV[image, start:stop].numpy(), places_S, largest_R1, _draws(noise, image, start, places_S)
        )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        drawn = np.concatenate(list(pool.map(draw, blocks)))
    return torch.from_numpy(drawn).view(logits_BPV.shape[:-1])


def _draws(noise: Tensor | ScaleNoise, image: int, start: int, places_S: np.ndarray) -> np.ndarray:
    """Exp(1) draws of an image's tokens from `start` on at `places_S`."""
    size = noise.shape[-1]
    if isinstance(noise, ScaleNoise):
        return noise.at(image, places_S + start * size)
    return noise[image, start:].reshape(-1).numpy()[places_S]


def _draw(x_RV: np.ndarray, places_S: np.ndarray, largest_R1: np.ndarray, noise_S: np.ndarray) -> np.ndarray:
    """argmax of probability / noise in each row over the tokens that stay, int64 [R]."""
    size = x_RV.shape[-1]
    rows_S = places_S // size
    odds_S = np.exp(x_RV.reshape(-1)[places_S] - largest_R1[rows_S, 0]) / noise_S
    best_R = np.maximum.reduceat(odds_S, np.searchsorted(places_S, np.arange(len(x_RV)) * size))
    # Of equal ones the first, which is assigned last.
    winners = np.flatnonzero(odds_S == best_R[rows_S])[::-1]
    tokens_R = np.empty(len(x_RV), dtype=np.int64)
    tokens_R[rows_S[winners]] = places_S[winners] % size
    return tokens_R


def gumbel_temperature(ratio: float) -> float:
    """Temperature τ = max(0.27·(1 − 0.95·r), 0.005) of the soft mixture at progress r in [0, 1]."""
    return max(0.27 * (1.0 - 0.95 * ratio), 0.005)


def gumbel_softmax(logits_BPV: Tensor, noise_BPV: Tensor, temperature: float) -> Tensor:
    """softmax((logits − log e)/τ) with Exp(1) draws e: a soft one-hot token."""
    return ((logits_BPV - noise_BPV.log()) / temperature).softmax(dim=-1)
