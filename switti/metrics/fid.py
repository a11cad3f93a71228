"""FID and KID: Fréchet and kernel distance between two sets of images, on injected features.

The feature network is outside the accumulators, so that several distances share one pass of it, and a distance can be
tested on numbers alone. A value is labelled by its network: `fid_alexnet` says nothing about `fid_inception`.

Shape suffixes: B images, N real samples, M generated samples, F features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from switti.errors import UserError, first_line
from switti.losses.perceptual import AlexNetFeatures
from switti.metrics.config import MetricsConfig
from switti.metrics.inception import FEATURES, InceptionUnderConvention, load_inception

# As torch-fidelity names it; pytorch-fid's own copy is called pt_inception-2015-12-05-6726825d.pth.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Samples of each set whose kernel values are in memory at a time.
BLOCK = 1024


class _Features(nn.Module):
    """Identity in the place of torchmetrics' feature network, for features computed elsewhere."""

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


def kernel_distance(real_NF: Tensor, fake_MF: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unbiased squared maximum mean discrepancy under k(x, y) = (x·y / F + 1)³, scalar float64 (KID, arXiv 1801.01401).

    Over all pairs rather than random subsets: no seed, less variance. May be slightly negative. nan with fewer than
    two samples on a side. Computed by blocks of the kernel matrices, in `dtype` and added up in float64: memory
    beyond the features stays the same. float32 is twice as fast; its rounding averages out over the pairs.
    """

    def within(values: Tensor) -> Tensor:
        pairs = len(values) * (len(values) - 1)
        if not pairs:
            return values.new_tensor(math.nan, dtype=torch.float64)
        diagonal = sum(((part.double().square().mean(dim=1) + 1) ** 3).sum() for part in values.split(BLOCK))
        return (_kernel_sum(values, None, dtype) - diagonal) / pairs

    crossed = _kernel_sum(real_NF, fake_MF, dtype) / max(1, len(real_NF) * len(fake_MF))
    return within(real_NF) + within(fake_MF) - 2 * crossed


def _kernel_sum(a_NF: Tensor, b_MF: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum of the kernel over all pairs, scalar float64; without b of all ordered pairs within a."""
    total = a_NF.new_zeros((), dtype=torch.float64)
    width = a_NF.shape[1]
    others = list((a_NF if b_MF is None else b_MF).split(BLOCK))
    for number, a in enumerate(a_NF.split(BLOCK)):
        rows = a.to(dtype)
        # The kernel is symmetric: blocks below the diagonal are those above it.
        for place, b in enumerate(others):
            if b_MF is None and place < number:
                continue
            part = (rows @ b.to(dtype).T).div_(width).add_(1).pow_(3).sum(dtype=torch.float64)
            total += part if b_MF is not None or place == number else 2 * part
    return total


class KernelDistance(Metric):
    """KID on features [N, F]; keeps the features (F numbers an image). Real ones stay over `reset`."""

    full_state_update = False
    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("fake_features", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features [B, F] of real or generated images; B may be 0."""
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

    The convention is that of torchmetrics: images of their own size are resized to 299 px by an antialiased bilinear
    filter and scaled to (x − 128) / 128. The paper's numbers come from another chain (Lanczos to 256 px, pytorch-fid's
    resize without antialiasing, x / 127.5 − 1, 30 000 images against statistics of the whole reference set), so that
    they must not be compared with these. setting: what named the file, for messages.
    """

    num_features = 2048

    def __init__(self, weights: str | Path, setting: str = "metrics.inception=") -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise UserError(
                f"{setting}{weights}: no such file; download {INCEPTION_FILE} from the releases of torch-fidelity"
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
            reason = first_line(error)
            raise UserError(f"{setting}{weights} does not hold Inception weights ({reason})") from error

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.network(images_B3HW)


# ---- as `metrics.names` builds them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetDistance:
    """A distance and the feature network [B, 3, H, W] → [B, width] that feeds it."""

    network: nn.Module
    width: int
    metric: Metric


def build_fid_alexnet(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, SetDistance]:
    width = AlexNetFeatures.num_features
    network = _shared(networks, "alexnet", lambda: AlexNetFeatures().to(device))
    return "fid_alexnet", SetDistance(network, width, FrechetDistance(width))


def build_kid_alexnet(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, SetDistance]:
    network = _shared(networks, "alexnet", lambda: AlexNetFeatures().to(device))
    return "kid_alexnet", SetDistance(network, AlexNetFeatures.num_features, KernelDistance())


def build_fid_inception(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, SetDistance]:
    weights, width = str(config.inception), InceptionFeatures.num_features
    network = _shared(networks, "inception", lambda: InceptionFeatures(weights).to(device))
    return "fid_inception", SetDistance(network, width, FrechetDistance(width))


def _inception_distance(
    kind: str,
    convention: str,
    config: MetricsConfig,
    device: torch.device | str,
    networks: dict[str, nn.Module],
) -> tuple[str, SetDistance]:
    weights = str(config.inception)
    network = _shared(
        networks,
        f"inception_{convention}",
        lambda: InceptionUnderConvention(load_inception(weights), convention).to(device),
    )
    metric = FrechetDistance(FEATURES) if kind == "fid" else KernelDistance()
    return f"{kind}_inception_{convention}", SetDistance(network, FEATURES, metric)


build_fid_pytorch_fid = partial(_inception_distance, "fid", "pytorch_fid")
build_kid_pytorch_fid = partial(_inception_distance, "kid", "pytorch_fid")
build_fid_torch_fidelity = partial(_inception_distance, "fid", "torch_fidelity")
build_kid_torch_fidelity = partial(_inception_distance, "kid", "torch_fidelity")
build_fid_clean = partial(_inception_distance, "fid", "clean")
build_kid_clean = partial(_inception_distance, "kid", "clean")


def _shared(networks: dict[str, nn.Module], name: str, build: Callable[[], nn.Module]) -> nn.Module:
    if name not in networks:
        networks[name] = build()
    return networks[name]
