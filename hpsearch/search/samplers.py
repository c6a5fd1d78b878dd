"""The samplers of Optuna as a study uses them: spread out at first, near what a person believes, on a tamed history."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from hpsearch.errors import UsageError
from hpsearch.registry import SAMPLERS
from hpsearch.search.optuna_internals import SearchStorage
from hpsearch.spec.space import Choice, Dimension, Space, listed
from hpsearch.spec.study import StudySpec

Expected = Callable[[FrozenTrial], float | None]
"""What a trial that has not ended by itself would come to; None of any other."""
EI_CANDIDATES = 64
"""Settings that TPE draws to choose one from; of Optuna's 24 the best one is often far from the best there is."""
LATEST_SEEN = 750
BEST_SEEN = 250
"""Trials of a large study that its sampler sees; see `_History`."""
_BLOCK = 100
"""Trials after which the best of the older ones are chosen anew."""
_PRIOR_SHARE = 2 / 3
_PRIOR_WIDTH = 0.25
"""See `_Prior`."""


@dataclass(frozen=True, kw_only=True)
class SamplerKind:
    """A sampler as studies name it."""

    make: Callable[[StudySpec, int], BaseSampler]
    """From the study, and the seed of this launch."""
    is_model_based: bool = False
    """Whether it learns from values: then its first trials are spread evenly, and it sees bad values clipped."""
    startup: Callable[[StudySpec], int | None] = lambda study: study.sampler.startup_trials
    """Trials before it knows anything, None when it never does: as long as that, draws gather around priors."""


TPE = SamplerKind(
    make=lambda study, seed: optuna.samplers.TPESampler(
        n_startup_trials=study.sampler.startup_trials,
        seed=seed,
        multivariate=True,
        group=any(dimension.when for dimension in study.space.dimensions.values()),
        constant_liar=True,
        n_ei_candidates=EI_CANDIDATES,
    ),
    is_model_based=True,
)
GP = SamplerKind(
    make=lambda study, seed: optuna.samplers.GPSampler(
        n_startup_trials=study.sampler.startup_trials, seed=seed, warn_independent_sampling=False
    ),
    is_model_based=True,
)
CMAES = SamplerKind(
    make=lambda study, seed: optuna.samplers.CmaEsSampler(
        n_startup_trials=study.sampler.startup_trials, seed=seed, warn_independent_sampling=False
    ),
    is_model_based=True,
)
RANDOM = SamplerKind(make=lambda study, seed: optuna.samplers.RandomSampler(seed=seed), startup=lambda study: None)
QMC = SamplerKind(
    make=lambda study, seed: optuna.samplers.QMCSampler(
        scramble=True, seed=seed, warn_independent_sampling=False, warn_asynchronous_seeding=False
    )
)


class _Grid(optuna.samplers.GridSampler):
    """Every setting once, as far as the sampler is asked; what is drawn in its place has no place in the grid."""

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: OptunaState, values: Sequence[float] | None
    ) -> None:
        """Optuna's own ends the study when the grid is used up, which a search finds by itself."""


GRID = SamplerKind(
    make=lambda study, seed: _Grid(
        {name: listed(dimension) for name, dimension in study.space.dimensions.items()}, seed=seed
    )
)


def make_sampler(study: StudySpec, seed: int, storage: SearchStorage, expected: Expected) -> BaseSampler:
    """The sampler that a study names. The seed is one of the launch; that of the study decides the first trials.

    One of a person's own is a SamplerKind, or a function of study and seed that makes a sampler. Raises UsageError.
    """
    found = SAMPLERS.load(study.sampler.name)
    kind = found if isinstance(found, SamplerKind) else SamplerKind(make=found)
    try:
        sampler = kind.make(study, seed)
    except Exception as error:
        if study.sampler.name in SAMPLERS.built_in:
            raise
        raise UsageError(f"sampler {study.sampler.name}: {type(error).__name__}: {error}") from error
    if not isinstance(sampler, BaseSampler):
        raise UsageError(f"sampler {study.sampler.name}: expected a sampler of Optuna's, got {type(sampler).__name__}")
    startup = kind.startup(study)
    if kind.is_model_based:
        sampler = _Clipped(sampler, storage, expected)
        if startup:
            sampler = _Spread(sampler, study.space, study.seed, startup)
    return _Prior(sampler, study.space, seed, startup) if study.space.priors else sampler


class _Wrapper(BaseSampler):
    """A sampler around another one, which does whatever a subclass leaves to it, while `_looking`."""

    def __init__(self, inner: BaseSampler) -> None:
        self._inner = inner

    def reseed_rng(self) -> None:
        self._inner.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        with self._looking(study):
            self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        with self._looking(study):
            return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with self._looking(study):
            return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        with self._looking(study):
            return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: OptunaState, values: Sequence[float] | None
    ) -> None:
        with self._looking(study):
            self._inner.after_trial(study, trial, state, values)

    def _looking(self, study: optuna.Study) -> AbstractContextManager[None]:
        """While the inner sampler looks at the study."""
        return nullcontext()


class _Spread(_Wrapper):
    """A model-based sampler whose first trials are spread evenly over each setting, in place of drawn at random.

    A Latin hypercube: McKay, Beckman & Conover, Technometrics 21 (1979). Of n trials one falls into each nth of a
    range, and each of k choices comes up in n/k of them.
    """

    def __init__(self, inner: BaseSampler, space: Space, seed: int, count: int) -> None:
        super().__init__(inner)
        self._space = space
        self._seed = seed
        self._count = count

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if self._is_first(trial) else super().infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        # TPE with groups goes by its own groups, whatever space it is given.
        return {} if self._is_first(trial) else super().sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if not self._is_first(trial):
            return super().sample_independent(study, trial, param_name, param_distribution)
        random = np.random.default_rng([self._seed, *param_name.encode()])
        places = (random.permutation(self._count) + random.random(self._count)) / self._count
        return _at_part(self._space.dimensions[param_name], float(places[trial.number]))

    def _is_first(self, trial: FrozenTrial) -> bool:
        return trial.number < self._count


def _at_part(dimension: Dimension, part: float) -> Any:
    """The value that this part (0 to 1) of a dimension's values, or of its range, lies below."""
    if isinstance(dimension, Choice):
        return dimension.values[int(part * len(dimension.values))]
    low, high = dimension.low, dimension.high
    if not dimension.log and math.isfinite(dimension.size):
        value = low + (dimension.step or 1) * int(part * dimension.size)
        return int(value) if dimension.integer else value
    if dimension.log:
        # Of whole numbers each has what rounds to it, as in Optuna.
        low, high = (low - 0.5, high + 0.5) if dimension.integer else (low, high)
        value = math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    else:
        value = low + part * (high - low)
    value = min(dimension.high, max(dimension.low, value))
    return round(value) if dimension.integer else value


class _Prior(_Wrapper):
    """A sampler whose random draws gather around the values that a person believes in, as long as it knows little.

    Two of three trials are drawn around the priors, by a normal distribution of a quarter of the (scaled) range, the
    third is not: a prior that is wrong costs some trials and cannot mislead for long. After the start the sampler has
    data. The draws are those of PriorBand: Mallik et al., NeurIPS 2023.
    """

    def __init__(self, inner: BaseSampler, space: Space, seed: int, startup: int | None) -> None:
        super().__init__(inner)
        self._space = space
        self._seed = seed
        self._startup = startup
        self._has_started = False

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        drawn = super().sample_independent(study, trial, param_name, param_distribution)
        dimension = self._space.dimensions[param_name]
        random = np.random.default_rng([self._seed, trial.number])
        if dimension.prior is None or random.random() >= _PRIOR_SHARE or not self._is_early(study):
            return drawn
        random = np.random.default_rng([self._seed, trial.number, *param_name.encode()])
        return _around(dimension, random, drawn)

    def _is_early(self, study: optuna.Study) -> bool:
        if self._startup is None:
            return True
        if not self._has_started:
            ended = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE, OptunaState.PRUNED))
            self._has_started = len(ended) >= self._startup
        return not self._has_started


def _around(dimension: Dimension, random: np.random.Generator, otherwise: Any) -> Any:
    """A value near a dimension's prior; of choices the prior itself or, as often, `otherwise`."""
    assert dimension.prior is not None
    if isinstance(dimension, Choice):
        return dimension.prior if random.random() < 0.5 else otherwise
    forth, back = (math.log, math.exp) if dimension.log else (float, float)
    low, high, centre = forth(dimension.low), forth(dimension.high), forth(dimension.prior)
    drawn = math.inf
    while not low <= drawn <= high:
        drawn = random.normal(centre, _PRIOR_WIDTH * (high - low))
    value = min(dimension.high, max(dimension.low, back(drawn)))
    if dimension.integer or dimension.step is not None:
        step = dimension.step or 1
        last = math.floor((dimension.high - dimension.low) / step + 1e-9)
        value = dimension.low + step * min(last, round((value - dimension.low) / step))
    return int(value) if dimension.integer else value


class _Clipped(_Wrapper):
    """A model-based sampler that sees bad values clipped at the running median, and diverged trials there, too.

    It sees paused trials at their expected final values.
    Diverged runs are outliers that wreck a Gaussian process (and are no numbers at all); clipped, they still say
    "not here". Winsorised targets for Bayesian optimisation: Eriksson & Poloczek, AISTATS 2021 (SCBO), appendix.
    """

    def __init__(self, inner: BaseSampler, storage: SearchStorage, expected: Expected) -> None:
        super().__init__(inner)
        self._storage = storage
        self._history = _History()
        self._expected = expected

    def _looking(self, study: optuna.Study) -> AbstractContextManager[None]:
        maximise = study.direction is StudyDirection.MAXIMIZE
        return self._storage.seen_as(partial(self._clipped, maximise=maximise))

    def _clipped(self, trials: list[FrozenTrial], *, maximise: bool) -> list[FrozenTrial]:
        seen = self._history.seen(trials, maximise=maximise)
        values = [self._expected(trial) for trial in seen]
        seen = [trial if value is None else _at(trial, value) for trial, value in zip(seen, values, strict=True)]
        return clip_at_median(seen, maximise=maximise)


class _History:
    """Which trials of a large study a sampler learns from: the latest, the best before them, and those that still run.

    TPE tells the best 25 from the rest, and a sample of the rest says as much; a Gaussian process takes the cube of
    their number in time. So asking costs no more after ten thousand trials than after one thousand.
    """

    def __init__(self) -> None:
        self._older = 0
        self._kept: list[int] = []

    def seen(self, trials: list[FrozenTrial], *, maximise: bool) -> list[FrozenTrial]:
        older = max(0, len(trials) - LATEST_SEEN) // _BLOCK * _BLOCK
        if older == 0:
            return trials
        if older != self._older:
            # What has ended stays as it is: the choice among them holds until there are many more.
            self._older = older
            self._kept = self._chosen(trials[:older], maximise=maximise)
        return [*(trials[number] for number in self._kept), *trials[older:]]

    @staticmethod
    def _chosen(trials: list[FrozenTrial], *, maximise: bool) -> list[int]:
        sign = -1.0 if maximise else 1.0
        ended = [
            (sign * trial.value, trial.number)
            for trial in trials
            if trial.state is OptunaState.COMPLETE and trial.value is not None
        ]
        open_ones = [trial.number for trial in trials if not trial.state.is_finished()]
        return sorted([*open_ones, *(number for _, number in heapq.nsmallest(BEST_SEEN, ended))])


def clip_at_median(trials: Sequence[FrozenTrial], *, maximise: bool = False) -> list[FrozenTrial]:
    """The trials with complete values worse than the median moved to it, and valueless pruned ones complete at it."""
    values = [
        trial.value
        for trial in trials
        if trial.state is OptunaState.COMPLETE and trial.value is not None and math.isfinite(trial.value)
    ]
    if not values:
        return list(trials)
    median = float(np.median(values))
    return [_at(trial, median) if _is_clipped(trial, median, maximise) else trial for trial in trials]


def _is_clipped(trial: FrozenTrial, median: float, maximise: bool) -> bool:
    if trial.state is OptunaState.PRUNED:
        return trial.value is None
    if trial.state is not OptunaState.COMPLETE or trial.value is None:
        return False
    return trial.value < median if maximise else trial.value > median


def _at(trial: FrozenTrial, value: float) -> FrozenTrial:
    # What copy.copy does, at a tenth of its cost: half of a history is clipped for every question.
    clipped = object.__new__(FrozenTrial)
    clipped.__dict__.update(trial.__dict__)
    clipped.state = OptunaState.COMPLETE
    clipped.value = value
    return clipped
