"""Pruners of Optuna by the names that a study file has for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import optuna

from hpsearch.spec.sections import UnpromisingSpec


def make_pruner(spec: UnpromisingSpec, max_epochs: int, per_epoch: int) -> optuna.pruners.BasePruner:
    """Steps are evaluations, `per_epoch` of them, counted from 1; median and percentile look at the ends of epochs."""
    # Optuna warms up while step < n_warmup_steps.
    warmup = per_epoch * (1 + (math.ceil(max_epochs / 5) if spec.warmup_epochs is None else spec.warmup_epochs))
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "promote": optuna.pruners.NopPruner,
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(spec.startup_trials, warmup, per_epoch),
        "percentile": lambda: optuna.pruners.PercentilePruner(spec.percentile, spec.startup_trials, warmup, per_epoch),
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=spec.min_epochs * per_epoch, reduction_factor=spec.reduction_factor
        ),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(
            min_resource=spec.min_epochs * per_epoch,
            max_resource=max(max_epochs, spec.min_epochs) * per_epoch,
            reduction_factor=spec.reduction_factor,
        ),
    }
    return pruners[spec.rule]()
