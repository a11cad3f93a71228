"""How much each parameter of a search decides its outcome: PED-ANOVA (arXiv 2304.10255) as Optuna computes it."""

import warnings
from dataclasses import dataclass
from typing import Any

from reports.data.search import Parameter, Search
from reports.data.study import show

LEAST_TRIALS = 10
# Of the finished trials, how many count as good.
_TOP_TRIALS, _TOP_SHARE = 5, 0.1


@dataclass(frozen=True)
class Importance:
    """shares: parameter → share, the largest first, sum 1. top: share of the trials that count as good."""

    shares: dict[str, float]
    evaluator: str
    trials: int
    top: float


def importance(search: Search) -> Importance | str:
    """The parameters' importance, or the reason why there is none."""
    trials = search.of("finished")
    varied = [p for p in search.parameters if len({show(trial.parameters[p.name]) for trial in trials}) > 1]
    if len(trials) < LEAST_TRIALS:
        return f"it needs at least {LEAST_TRIALS} finished trials, there are {len(trials)}"
    if len(varied) < 2:
        return "it needs at least two parameters that vary"
    if len({trial.value for trial in trials}) < 2:
        return "all finished trials have one value"
    try:
        import optuna
    except ImportError:
        return "Optuna is not installed (pip install 'optuna>=5,<6')"
    top = min(0.5, max(_TOP_SHARE, _TOP_TRIALS / len(trials)))
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The evaluator is marked as experimental.
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="minimize" if search.minimize else "maximize")
            for trial in trials:
                values = {p.name: _stored(p, trial.parameters[p.name]) for p in varied}
                kinds = {p.name: _distribution(p, optuna) for p in varied}
                study.add_trial(
                    optuna.trial.create_trial(params=values, distributions=kinds, value=trial.value)
                )
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=top)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except Exception as error:
        # Values outside of the space, or another version of Optuna.
        return f"Optuna cannot compute it: {error}"
    finally:
        optuna.logging.set_verbosity(level)
    return Importance(dict(shares), f"PED-ANOVA, Optuna {optuna.__version__}", len(trials), top)


def _stored(parameter: Parameter, value: Any) -> Any:
    return value if parameter.choices is None else show(value)


def _distribution(parameter: Parameter, optuna: Any) -> Any:
    kinds = optuna.distributions
    if parameter.choices is not None:
        return kinds.CategoricalDistribution([show(choice) for choice in parameter.choices])
    if parameter.is_integer:
        step = int(parameter.step or 1)
        return kinds.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return kinds.FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
