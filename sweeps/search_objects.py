"""Optuna's objects for a search: distributions, samplers, pruners and the storage."""

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from configs.yaml_values import text_of
from sweeps.search_space import Axis, Search, without_password
from sweeps.storage import open_storage, reason
from sweeps.study import Study
from switti.errors import UserError


def stored(value: Any) -> Any:
    """A choice as a storage can keep it."""
    return value if value is None or isinstance(value, bool | int | float | str) else text_of(value)


def meant(axis: Axis, value: Any) -> Any:
    """The choice that a storage has kept as `value`."""
    return next((choice for choice in axis.choices or [] if stored(choice) == value), value)


def distribution(axis: Axis) -> BaseDistribution:
    """The distribution of an axis."""
    if axis.choices is not None:
        return CategoricalDistribution([stored(choice) for choice in axis.choices])
    assert axis.low is not None and axis.high is not None
    if isinstance(axis.low, int):
        return IntDistribution(axis.low, int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def sampler(search: Search, trials: int) -> "optuna.samplers.BaseSampler":
    """The sampler of the next trial: a function of the seed and of the trials so far, whichever driver asks."""
    seed = search.seed * 100_003 + trials
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=search.startup_trials, constant_liar=True
        )
    return optuna.samplers.RandomSampler(seed=seed)


def pruner(search: Search) -> "optuna.pruners.BasePruner":
    """The pruner, which stops trials that are not promising."""
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(search.startup_trials, search.warmup_steps)
    if search.pruner == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    return optuna.pruners.HyperbandPruner() if search.pruner == "hyperband" else optuna.pruners.NopPruner()


def open_search(study: Study) -> "tuple[optuna.Study, optuna.storages.BaseStorage]":
    """Optuna's study of this name, made if need be, and its storage. UserError if the storage cannot be opened."""
    search = study.search
    assert search is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = open_storage(study)
        trials = optuna.create_study(
            study_name=study.name,
            storage=storage,
            direction=search.direction,
            sampler=sampler(search, 0),
            pruner=pruner(search),
            load_if_exists=True,
        )
    except Exception as error:  # whatever a database driver raises
        raise UserError(
            f"search.storage={without_password(search.storage) or 'null'} cannot be opened: {reason(search, error)}"
        ) from error
    return trials, storage
