"""Metric names of several validation splits: all images together, then each split by its name."""

from lightning.pytorch import Trainer

from switti.contracts import SplitValidation

ALL = "validation"


def metric_prefixes(trainer: Trainer) -> list[str]:
    """["validation"], followed by "validation/<split>" for each split that the data module names, by its loader."""
    data = getattr(trainer, "datamodule", None)
    names = data.validation_splits if isinstance(data, SplitValidation) else []
    return [ALL, *(f"{ALL}/{name}" if name else "" for name in names)]


def of_batch(prefixes: list[str], loader: int) -> list[str]:
    """The prefixes under which a batch of this loader is counted."""
    return [prefixes[0], *(prefix for prefix in prefixes[1 + loader : 2 + loader] if prefix)]
