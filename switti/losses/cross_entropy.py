"""Cross-entropy over all scales (Section 3.1), per scale for the curves.

Shape suffixes: B images, L tokens, R rows of any number of images, D width, V vocabulary, N scales.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switti.scales import Pyramid

# Logits computed at a time by the loss that includes the head: 32 MiB in float32.
CHUNK = 2**23


def token_losses(logits_BLV: Tensor, tokens_BL: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every token in nats, [B, L], in float32 (float64 for float64 logits).

    label_smoothing: mass in [0, 1) spread evenly over the vocabulary.
    """
    logits = logits_BLV.float() if logits_BLV.dtype.itemsize < 4 else logits_BLV
    losses = F.cross_entropy(
        logits.flatten(0, 1), tokens_BL.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return losses.view_as(tokens_BL)


class HeadLosses(NamedTuple):
    """mean: over all tokens, the only one with a gradient; tokens_BL: of every token; correct_BL: bool, whether the
    target has the largest logit, where asked for."""

    mean: Tensor
    tokens_BL: Tensor
    correct_BL: Tensor | None


def head_losses(
    head: nn.Linear,
    x_BLD: Tensor,
    tokens_BL: Tensor,
    label_smoothing: float = 0.0,
    correct: bool = True,
    chunk: int = CHUNK,
) -> HeadLosses:
    """`token_losses(head(x), tokens)` and their mean, without the logits [B, L, V] in memory.

    Logits are made a chunk of about `chunk` numbers at a time, in the type in which `head(x)` would make them under the
    surrounding autocast. Gradients of the mean are computed together with it, from the same chunk, so that nothing is
    computed twice; backward only scales them.
    """
    kind = x_BLD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BLD.dtype
    differentiate = torch.is_grad_enabled() and (x_BLD.requires_grad or head.weight.requires_grad)
    rows = max(1, chunk // len(head.weight))
    arguments = (tokens_BL.flatten(), label_smoothing, correct, dtype, rows, differentiate)
    with torch.autocast(kind, enabled=False):
        mean, losses, hits = _HeadLosses.apply(x_BLD.flatten(0, 1), head.weight, head.bias, *arguments)
    return HeadLosses(mean, losses.view_as(tokens_BL), hits.view_as(tokens_BL) if correct else None)


class _HeadLosses(torch.autograd.Function):
    """(mean, losses [R], hits [R]) of rows [R, D]; of these only the mean is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tokens_R: Tensor,
        smoothing: float,
        correct: bool,
        dtype: torch.dtype,
        rows: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        dx_RD, d_weight, d_bias = (
            (torch.empty_like(x_RD), torch.zeros_like(weight_VD), weight_VD.new_zeros(len(weight_VD)))
            if differentiate
            else (None, None, None)
        )
        losses, hits = [], [tokens_R.new_empty(0, 1, dtype=torch.bool)]
        for start in range(0, len(x_RD), rows):
            part = slice(start, start + rows)
            x, tokens = x_RD[part].to(dtype), tokens_R[part, None]
            logits = F.linear(x, weight, bias)
            if correct:
                hits.append(logits.argmax(dim=-1, keepdim=True) == tokens)
            logarithms = logits.log_softmax(-1, torch.promote_types(dtype, torch.float32))
            del logits
            loss = logarithms.gather(1, tokens).neg_()
            if smoothing:
                loss.mul_(1 - smoothing).sub_(logarithms.mean(dim=-1, keepdim=True), alpha=smoothing)
            losses.append(loss)
            if dx_RD is None or d_weight is None or d_bias is None:
                continue
            # Softmax minus target; the mean's 1/R comes after the products.
            above = logarithms.exp_().scatter_add_(1, tokens, torch.full_like(loss, smoothing - 1))
            if smoothing:
                above.sub_(smoothing / len(weight))
            d_bias += above.sum(dim=0)
            above = above.to(dtype)
            dx_RD[part] = above @ weight
            d_weight += above.T @ x
        ctx.has_bias = bias_V is not None
        ctx.rows = len(x_RD)
        if differentiate:
            ctx.save_for_backward(dx_RD, d_weight, d_bias)
        losses_R, hits_R = torch.cat(losses).squeeze(1), torch.cat(hits).squeeze(1)
        ctx.mark_non_differentiable(losses_R, hits_R)
        return losses_R.mean(), losses_R, hits_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0] / ctx.rows
        dx, d_weight, d_bias = (gradient * factor for gradient in ctx.saved_tensors)
        return dx, d_weight, d_bias if ctx.has_bias else None, None, None, None, None, None, None


@torch.no_grad()
def by_scale(values_BL: Tensor, pyramid: Pyramid) -> Tensor:
    """Mean over images and tokens of each scale, [N]."""
    return torch.stack([part.mean() for part in pyramid.split(values_BL.detach().float())])
