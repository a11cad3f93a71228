"""Statistics of real images for FID and KID: made from shards or folders, or read from files of other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.statistics import FeatureStatistics
from switti.errors import UserError
from switti.files import atomic_write, check_regular, kind_of

FORMAT = "switti reference statistics 1"


@dataclass(frozen=True)
class Reference:
    """statistics of one feature network. features_NF: for KID; None in files that hold mean and covariance alone.

    network: name of the features ("inception_pytorch_fid"); "" where the file does not say.
    digest: of the network's weights.
    """

    network: str
    digest: str
    statistics: FeatureStatistics
    features_NF: np.ndarray | None
    source: str


def save_reference(path: Path, reference: Reference) -> None:
    """An .npz file with mu, sigma, n, features (float16), network, digest, source."""
    statistics = reference.statistics
    content: dict[str, Any] = {
        "format": FORMAT,
        "mu": statistics.mean_F,
        "sigma": statistics.covariance_FF,
        "n": np.int64(statistics.count or 0),
        "network": reference.network,
        "digest": reference.digest,
        "source": reference.source,
    }
    if reference.features_NF is not None:
        content["features"] = reference.features_NF.astype(np.float16)
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **content)


def load_reference(path: Path) -> Reference:
    """A file of `save_reference`, or any .npz with mu and sigma, as pytorch-fid and the published evaluation write it.

    Raises:
        UserError: it is not such a file, or its shapes do not fit.
    """
    if kind_of(path) != "file":
        raise UserError(
            f"--reference {path}: no such file; make it with python -m experiments.reference_stats"
        )
    try:
        with np.load(check_regular(path), allow_pickle=False) as content:
            mean, covariance = content["mu"].astype(np.float64), content["sigma"].astype(np.float64)
            features = content["features"].astype(np.float32) if "features" in content else None
            count = int(content["n"]) if "n" in content else None
            network, digest, source = (
                str(content[name]) if name in content else "" for name in ("network", "digest", "source")
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"--reference {path} is not a file of statistics (an .npz with mu and sigma): {error}"
        ) from error
    fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
    if not fits or (features is not None and (features.ndim != 2 or features.shape[1] != len(mean))):
        raise UserError(f"--reference {path}: mu {mean.shape} and sigma {covariance.shape} do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"--reference {path} holds numbers that are not finite")
    statistics = FeatureStatistics(mean, covariance, count)
    return Reference(network, digest, statistics, features, source or str(path))
