"""What a worker is asked to run."""

from __future__ import annotations

from hpsearch.driver.run.trials import WaitingTrial
from hpsearch.files.layout import attempt_folder, earlier_attempts
from hpsearch.files.ownership import Owner
from hpsearch.files.storage import Folder
from hpsearch.pruning import rungs
from hpsearch.records import TrialConfig
from hpsearch.search.study import Suggestion
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import StudySpec


class TrialConfigs:
    """Makes the configurations of a study's trials, each for an attempt in a folder of its own."""

    def __init__(self, spec: StudySpec, *, uid: str, run: Folder, data: Folder, owner: Owner, threads: int) -> None:
        self._spec = spec
        self._uid = uid
        self._run = run
        self._data = data
        self._owner = owner
        self._threads = threads

    def make(self, suggestion: Suggestion, waiting: WaitingTrial) -> TrialConfig:
        """The next attempt at a trial."""
        spec = self._spec
        if waiting.settings is None:
            model, training = spec.settings_for(suggestion.params)
        else:
            # Where a pretrained model lies is no part of the settings.
            model = ModelSettings(**{**waiting.settings["model"], "pretrained": spec.model.pretrained})
            training = RunSettings(**waiting.settings["training"])
        attempt = waiting.attempt + 1
        folder = attempt_folder(self._run, suggestion.number, attempt)
        self._owner.remove(folder)
        return TrialConfig(
            study=spec.name,
            study_uid=self._uid,
            number=suggestion.number,
            task=spec.task,
            seed=spec.seed if waiting.seed is None else waiting.seed,
            params=suggestion.params,
            attributes=suggestion.attributes,
            repeat_of=waiting.repeat_of,
            objective=spec.objective,
            model=model,
            training=training,
            options=spec.options.model_dump(mode="json"),
            rule=spec.prune.overfit,
            data=str(self._data),
            folder=str(folder),
            attempt=attempt,
            earlier=tuple(str(place) for place in earlier_attempts(self._run, suggestion.number, attempt)),
            recorded=waiting.last.evaluation if waiting.last else 0,
            rungs=self._rungs(training) if waiting.repeat_of is None else (),
            max_minutes=spec.limits.max_minutes,
            stall_minutes=spec.limits.stall_minutes,
            threads=self._threads,
        )

    def _rungs(self, training: RunSettings) -> tuple[float, ...]:
        """Parts of a run with these settings at which it may be paused."""
        rule = self._spec.prune.unpromising
        return rungs.places(rule.reduction_factor, training.warmup_fraction) if rule.rule == "promote" else ()
