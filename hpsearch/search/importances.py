"""How much each sampled setting explains of what sets good trials apart."""

from __future__ import annotations

import warnings

import optuna
from optuna.trial import TrialState as OptunaState

from hpsearch.search.attributes import REPEAT
from hpsearch.search.record import away, open_storage


def importances(url: str, study: str) -> dict[str, float] | None:
    """How much each sampled setting explains of what sets good trials apart; None where nothing can be computed.

    PED-ANOVA (Watanabe, Bansal & Hutter, PED-ANOVA, IJCAI 2023), over trials that finished; repeats of the finals are
    left out.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with away(url):
        storage = open_storage(url)
        try:
            found = optuna.load_study(study_name=study, storage=storage)
            direction, trials = found.direction, found.get_trials(deepcopy=False, states=[OptunaState.COMPLETE])
        except KeyError:
            return None
        finally:
            storage.remove_session()
            storage.engine.dispose()
    copied = optuna.create_study(direction=direction)
    copied.add_trials([trial for trial in trials if REPEAT not in trial.system_attrs])
    with warnings.catch_warnings():
        # Optuna would call all settings equally important.
        warnings.filterwarnings("error", message="The number of trials is too small")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return optuna.importance.get_param_importances(copied, evaluator=evaluator)
        except (ValueError, RuntimeError, UserWarning):  # too few trials, or none that differ
            return None
