"""System attributes of trials in Optuna's tables that a resumed study needs."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

START = "hpsearch:start"
"""System attribute of a trial whose settings a person or an earlier study gave: these settings, as JSON."""
REPEAT = "hpsearch:repeat_of"
SEED = "hpsearch:seed"
"""System attributes of a trial of the finals: the trial that it repeats, and its seed."""
RUNG = "hpsearch:rung:"
"""How the system attributes begin that hold a trial's values at its rungs."""
_MIRRORED_ATTRIBUTES = (START, REPEAT, SEED, "grid_id", "search_space", "completed_rung_")
"""System attributes that a resumed study needs. CMA-ES's pickled optimizer is none of them."""


def mirrored(trial: FrozenTrial) -> dict[str, Any]:
    return {key: value for key, value in trial.system_attrs.items() if key.startswith(_MIRRORED_ATTRIBUTES)}


def as_running(trial: FrozenTrial) -> FrozenTrial:
    """What the sampler sees of a trial that waits for its next attempt: one whose answer is to come."""
    if trial.state is not OptunaState.WAITING:
        return trial
    running = copy.copy(trial)
    running.state = OptunaState.RUNNING
    running.datetime_start = running.datetime_start or datetime.now()
    return running


def as_untold(trial: FrozenTrial) -> FrozenTrial:
    """What the sampler sees of a trial of the finals: a failed one, which it learns nothing from."""
    return create_trial(
        state=OptunaState.FAIL, params=trial.params, distributions=trial.distributions, system_attrs=trial.system_attrs
    )
