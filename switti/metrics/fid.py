"""Distances between sets of pictures: Fréchet (FID) and kernel (KID), on injected features.

The feature network is outside the accumulators, so that several distances share one pass of it, and a distance can be
tested on numbers alone. A value is labelled by its network: `fid_alexnet` says nothing about `fid_inception`.

Shape suffixes: N real samples, M generated samples, F feature numbers.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from switti.errors import UserError


class _Features(nn.Module):
    """What torchmetrics asks of a feature network, for features that are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features_NF: Tensor) -> Tensor:
        return features_NF


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' FID on features [N, F]: `update(features, real=…)`. Sums in float64 cross processes, once.

    nan with fewer than two samples on a side. Real statistics stay over `reset`.
    """

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(feature=_Features(num_features), reset_real_features=False, **options)

    def compute(self) -> Tensor:
        if min(int(self.real_features_num_samples), int(self.fake_features_num_samples)) < 2:
            return torch.tensor(float("nan"))
        return super().compute()


def kernel_distance(real_NF: Tensor, fake_MF: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy under k(x, y) = (x·y / F + 1)³, scalar float64 (KID, arXiv 1801.01401).

    Over all pairs rather than random subsets: no seed, less variance. May be slightly negative. nan with fewer than
    two samples on a side.
    """
    real, fake = real_NF.double(), fake_MF.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(values: Tensor) -> Tensor:
        gram, count = kernel(values, values), len(values)
        pairs = count * (count - 1)
        return (gram.sum() - gram.diagonal().sum()) / pairs if pairs else gram.new_tensor(float("nan"))

    return within(real) + within(fake) - 2 * kernel(real, fake).mean()


class KernelDistance(Metric):
    """KID on features [N, F]; keeps the features (F numbers a picture). Real ones stay over `reset`."""

    full_state_update = False
    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("fake_features", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features [B, F] of real or generated pictures; B may be 0."""
        (self.real_features if real else self.fake_features).append(features)

    def compute(self) -> Tensor:
        """Scalar float64."""
        return kernel_distance(dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features))

    def reset(self) -> None:
        real = list(self.real_features)
        super().reset()
        self.real_features = real


class InceptionFeatures(nn.Module):
    """FID's own Inception v3, from a local weights file: uint8 [B, 3, H, W] → [B, 2048].

    setting: what named the file, for messages.
    """

    num_features = 2048

    def __init__(self, weights: str | Path, setting: str = "metrics.inception=") -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise UserError(
                f"{setting}{weights}: no such file; download pt_inception-2015-12-05-6726825d.pth "
                "from the releases of torch-fidelity"
            )
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.network = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=["2048"],
                feature_extractor_weights_path=str(weights),
            )
        except ModuleNotFoundError as error:
            raise UserError(
                "fid_inception needs the package torch-fidelity; pip install torch-fidelity"
            ) from error
        except (RuntimeError, OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{setting}{weights} does not hold Inception weights ({reason})") from error

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.network(images_B3HW)
