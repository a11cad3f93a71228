"""Cross-entropy over all scales (Section 3.1), per scale for the curves.

Shape suffixes: B images, L tokens, V vocabulary, N scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from switti.scales import Pyramid


def token_losses(logits_BLV: Tensor, tokens_BL: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every token in nats, [B, L], in float32 (float64 for float64 logits).

    label_smoothing: mass in [0, 1) spread evenly over the vocabulary.
    """
    logits = logits_BLV.float() if logits_BLV.dtype.itemsize < 4 else logits_BLV
    losses = F.cross_entropy(
        logits.flatten(0, 1), tokens_BL.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return losses.view_as(tokens_BL)


@torch.no_grad()
def by_scale(values_BL: Tensor, pyramid: Pyramid) -> Tensor:
    """Mean over images and tokens of each scale, [N]."""
    return torch.stack([part.mean() for part in pyramid.split(values_BL.detach().float())])
