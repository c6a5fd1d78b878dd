"""Dimensions of a space as Optuna has them."""

from __future__ import annotations

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from hpsearch.spec.space import Choice, Dimension


def distribution_of(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if dimension.integer:
        low, high = int(dimension.low), int(dimension.high)
        return IntDistribution(low, high, log=dimension.log, step=int(dimension.step or 1))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> None:
    if isinstance(dimension, Choice):
        trial.suggest_categorical(name, dimension.values)
    elif dimension.integer:
        trial.suggest_int(
            name, int(dimension.low), int(dimension.high), step=int(dimension.step or 1), log=dimension.log
        )
    else:
        trial.suggest_float(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
