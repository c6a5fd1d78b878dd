"""Who is best, by the test metric, and by how much: ranks, ties, finals. Imports neither torch nor Ray.

Scores are compared only when their contracts are equal. Perplexities of different tokenizers are ranked in bits per
byte instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpsearch.errors import UsageError
from hpsearch.metrics import statistics, ties
from hpsearch.metrics.metric import Examples
from hpsearch.metrics.statistics import METRICS
from hpsearch.records import RANKED
from hpsearch.spec.task import known_task, task_named
from hpsearch.store.rows import LeadingTrial, RankedTrial, ScoreRow, StudyRow, TrialRow
from hpsearch.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

_MANY_TRIALS = 500
Choice = Literal["test", "validation"]
"""What a winner is chosen by."""
SIGNIFICANCE = 0.05
"""Trials whose p-value against the winner is above this are tied with it."""


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A configuration of the finals: the settings of a trial, run again with new seeds."""

    study: str
    trial: int
    metric: str
    chosen_score: float
    """The test score that chose it."""
    seeds: int
    mean: float
    """Of the new seeds' test scores, as the three that follow."""
    standard_deviation: float | None
    low: float
    high: float
    dropped: float
    """By how much the mean is worse than the score that chose it."""
    repeats: list[int]
    """Numbers of the trials that ran it again."""
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MetricComparison:
    """The paired test of two trials in one metric."""

    metric: str
    scores: list[float]
    difference: float
    """Of the first from the second, with its 95 % interval."""
    low: float
    high: float
    p_value: float
    better: int | None
    """The trial that is better, if they can be told apart."""
    n: int
    """Test examples."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The paired tests of two ranked trials."""

    study: str
    trials: list[int]
    metrics: list[MetricComparison]


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """The ranked trials of one study or several, best test score first."""

    studies: list[str]
    task: str
    metric: str
    objective: str
    rows: list[RankedTrial]
    states: dict[str, int]
    validation_choice: RankedTrial | None
    """The trial that validation alone would have chosen; it is the winner's rival to look at."""
    leading: LeadingTrial | None
    """Of one study: a trial without a test score whose best validation value is better than that of all ranked ones."""
    finals: list[Finalist]
    """Of one study: configurations that were run again with new seeds, best mean first."""
    note: str | None = None

    @property
    def study(self) -> str:
        return " + ".join(self.studies)

    @property
    def best(self) -> RankedTrial | None:
        return self.rows[0] if self.rows else None

    def chosen(self, by: Choice) -> RankedTrial | LeadingTrial | None:
        """The trial to take by its test score or on validation; without any test score, the one that leads there."""
        if by == "test" and self.rows:
            return self.best
        return self.leading or self.validation_choice

    def to_json(self) -> dict[str, Any]:
        choice = self.validation_choice
        return {
            "schema_version": 1,
            "study": self.study,
            "task": self.task,
            "metric": self.metric,
            "objective": self.objective,
            "states": self.states,
            "validation_would_choose": choice.trial if choice else None,
            "leading": vars(self.leading) if self.leading else None,
            "trials": [vars(row) for row in self.rows],
            "finals": [vars(row) for row in self.finals],
        }


def leaderboard(store: Store, *studies: str, top: int | None = None, mixed: bool = False) -> Leaderboard:
    """The leaderboard of a study, or of several together; `top` keeps the n best.

    Raises UnknownStudyError, and UsageError when scores cannot be compared (unless `mixed`).
    """
    found = [store.study(name) for name in dict.fromkeys(studies)]
    first = found[0]
    for other in found[1:]:
        if other.task != first.task:
            raise UsageError(
                f"'{first.name}' is a {first.task} study and '{other.name}' a {other.task} study: they "
                "have no score in common"
            )
    known_task(first.task)  # a task of one's own brings its metrics
    states: dict[str, int] = {}
    entries: list[_Entry] = []
    finals: list[Finalist] = []
    for study in found:
        counts = store.counts(study.id)
        for count in counts:
            if not count.is_repeat:
                states[count.state] = states.get(count.state, 0) + count.trials
        scores = store.study_scores(study.id, [first.metric])
        for row in store.leaderboard(study.name):
            if (scored := scores.get(row.trial)) is None:
                raise UsageError(
                    f"'{first.name}' is ranked by {first.metric}, and '{study.name}', ranked by {study.metric}, has no "
                    f"such score; name '{study.name}' first, or rank them apart"
                )
            entries.append(_Entry(row=row, id=scored[first.metric].trial_id, scores=scored))
        # Finals and the choice of validation are told within a study; across studies their scores need not compare.
        if len(found) == 1 and any(count.is_repeat for count in counts):
            finals = _finals(study, store.trials(study.id), scores)
    if first.metric == "perplexity" and _odd_one("perplexity", entries) is not None:
        for study in found:
            also = store.study_scores(study.id, ["bits_per_byte"])
            for entry in entries:
                if entry.row.study == study.name:
                    entry.scores.update(also.get(entry.row.trial, {}))
    metric, note = _common_metric(first.metric, entries, mixed=mixed)
    is_higher_better = first.higher_is_better if metric == first.metric else METRICS[metric].higher_is_better
    if metric not in METRICS:
        note = f"task {first.task} cannot be imported here, so that nothing is known of ties and intervals"
    rated = _rated(metric, entries, is_higher_better)
    wanted = {entry.id for entry in rated[:top]}
    chosen = None
    if len(found) == 1 and rated:
        # The rival is always there to be seen, wherever its test score put it.
        choice = min(rated, key=lambda entry: (entry.row.valid_rank, entry.row.trial))
        wanted.add(choice.id)
        chosen = choice.row.trial
    rows = _ranked(store, metric, rated, wanted)
    return Leaderboard(
        studies=[study.name for study in found],
        task=first.task,
        metric=metric,
        objective=first.objective,
        rows=rows,
        states=states,
        validation_choice=next((row for row in rows if row.trial == chosen), None),
        leading=_leading(store, first, entries) if len(found) == 1 else None,
        finals=finals,
        note=note,
    )


def _leading(store: Store, study: StudyRow, entries: Sequence[_Entry]) -> LeadingTrial | None:
    column: Literal["valid_loss", "valid_score"] = "valid_loss" if study.objective == "loss" else "valid_score"
    sign = 1 if column == "valid_loss" else -1
    ranked = {entry.row.trial for entry in entries}
    bests = [row for row in store.unfinished_bests(study.id, column) if row.trial not in ranked]
    best = min(bests, key=lambda row: (sign * row.value, row.trial), default=None)
    if best is None or any(sign * getattr(entry.row, column) <= sign * best.value for entry in entries):
        return None
    return best


def count_states(trials: Sequence[TrialRow]) -> dict[str, int]:
    """Trials by state, those of finals left out."""
    return dict(Counter(trial.state for trial in trials if trial.repeat_of is None))


def compare(store: Store, study: str, first: int, second: int) -> Comparison:
    """The paired test of two ranked trials, for every metric whose per-example statistics were kept.

    Raises UnknownStudyError, UsageError.
    """
    found = store.study(study)
    numbers = (first, second)
    rows = [store.trial(found, number) for number in numbers]
    kept = store.examples([row.id for row in rows])
    for row in rows:
        if row.id not in kept:
            reason = "" if row.state in RANKED else f" (it ended {row.state})"
            raise UsageError(f"trial {row.number} of '{study}' has no test answers to compare{reason}")
    examples = [statistics.unpack(kept[row.id]) for row in rows]
    scores = store.study_scores(found.id)
    task_named(found.task)  # a task of one's own brings its metrics
    metrics = []
    for metric in statistics.metrics_of(examples[0]):
        if not all(metric in scores[number] for number in numbers):
            continue
        pair = [scores[number][metric] for number in numbers]
        differs = _difference(pair[0].contract, pair[1].contract)
        if differs:
            raise UsageError(f"the {metric} of trials {first} and {second} cannot be compared: {differs}")
        observed = np.array([score.value for score in pair])
        resampled = ties.resample(metric, list(examples), pair[0].contract)
        low, high, p_value = ties.difference(observed, resampled, pair[0].n)
        better = None
        if p_value <= SIGNIFICANCE:
            better = numbers[int((observed[0] > observed[1]) != METRICS[metric].higher_is_better)]
        metrics.append(
            MetricComparison(
                metric=metric,
                scores=observed.tolist(),
                difference=float(observed[0] - observed[1]),
                low=low,
                high=high,
                p_value=p_value,
                better=better,
                n=pair[0].n,
            )
        )
    return Comparison(study=study, trials=list(numbers), metrics=metrics)


def frame(board: Leaderboard) -> pd.DataFrame:
    """One row a ranked trial; the sampled settings are columns `param_NAME`."""
    import pandas as pd

    return pd.DataFrame(flat_rows(board))


def flat_rows(board: Leaderboard) -> list[dict[str, Any]]:
    """The rows with `params` spread into `param_NAME`, the same keys in each, all-empty columns left out."""
    names = param_names(board.rows)
    hidden = ("params", "task") if len(board.studies) > 1 else ("params", "study", "task")
    flat = [
        {**{key: value for key, value in vars(row).items() if key not in hidden}}
        | {f"param_{name}": row.params.get(name) for name in names}
        for row in board.rows
    ]
    empty = {key for key in (flat[0] if flat else {}) if all(row[key] is None for row in flat)}
    return [{key: value for key, value in row.items() if key not in empty} for row in flat]


def param_names(rows: Sequence[TrialRow] | Sequence[RankedTrial]) -> list[str]:
    """Names of all sampled settings, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.params))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A ranked trial: its row of the view, its id, its scores by metric."""

    row: RankedTrial
    id: int
    scores: dict[str, ScoreRow]

    @property
    def name(self) -> str:
        return f"trial {self.row.trial} of '{self.row.study}'"


def _common_metric(metric: str, entries: Sequence[_Entry], *, mixed: bool) -> tuple[str, str | None]:
    """The metric in which all scores can be compared. Raises UsageError when there is none."""
    odd = _odd_one(metric, entries)
    if odd is None or mixed:
        return metric, "ranked across different contracts (--mixed): the scores are not comparable" if odd else None
    if metric == "perplexity" and _odd_one("bits_per_byte", entries) is None:
        return "bits_per_byte", "the tokenizers differ, so these are ranked in bits per byte"
    entry, differs = odd
    raise UsageError(
        f"the {metric} of {entries[0].name} and {entry.name} cannot be ranked together: {differs}. Rank them apart, or "
        "give --mixed to rank them all the same"
    )


def _odd_one(metric: str, entries: Sequence[_Entry]) -> tuple[_Entry, str] | None:
    """The first entry whose contract is not that of the first of all, and what differs."""
    for entry in entries[1:]:
        differs = _difference(entries[0].scores[metric].contract, entry.scores[metric].contract)
        if differs:
            return entry, differs
    return None


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    """What differs between two contracts, in words; empty when they are equal."""
    if first == second:
        return ""
    return ", ".join(
        f"{key} ({first.get(key)} and {second.get(key)})"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    )


def _rated(metric: str, entries: Sequence[_Entry], is_higher_better: bool) -> list[_Entry]:
    """The entries with their scores in this metric, best first."""
    sign = -1 if is_higher_better else 1
    rated = [replace(entry, row=_rated_row(metric, entry)) for entry in entries]

    def place(entry: _Entry) -> tuple[Any, ...]:
        row = entry.row
        # Of equal test scores the one that validation prefers comes first, here and wherever one of them is taken.
        return sign * row.score, row.study, row.valid_rank, row.trial

    return sorted(rated, key=place)


def _ranked(store: Store, metric: str, rated: Sequence[_Entry], wanted: Set[int]) -> list[RankedTrial]:
    """The rows of the wanted ones among all these entries, with rank, tie and p-value."""
    can_tell = metric in METRICS and _odd_one(metric, rated) is None
    p_values = _p_values(store, metric, rated, wanted) if can_tell else {}
    rows: list[RankedTrial] = []
    rank, score = 0, math.nan
    for place, entry in enumerate(rated, start=1):
        if entry.row.score != score:
            rank, score = place, entry.row.score
        if entry.id not in wanted:
            continue
        p_value = p_values.get(entry.id)
        tied = place > 1 and (rank == 1 or (p_value is not None and p_value > SIGNIFICANCE))
        rows.append(replace(entry.row, test_rank=rank, tie="1=" if tied else str(rank), p_value=p_value))
    return rows


def _rated_row(metric: str, entry: _Entry) -> RankedTrial:
    score = entry.scores[metric]
    if score.metric == entry.row.metric:
        return entry.row
    return replace(
        entry.row, metric=metric, score=score.value, score_low=score.low, score_high=score.high, score_n=score.n
    )


def _p_values(store: Store, metric: str, rated: Sequence[_Entry], wanted: Set[int]) -> dict[int, float]:
    """Of the wanted ones among all that are compared, by trial id; none for trials whose answers were not kept."""
    bounds: dict[int, float] = {}
    if len(rated) > _MANY_TRIALS:
        columns = ("score", "score_low", "score_high")
        values, low, high = (np.array([getattr(entry.row, name) for entry in rated]) for name in columns)
        found = ties.clearly_worse(values, low, high, higher_is_better=METRICS[metric].higher_is_better)
        bounds = {entry.id: float(bound) for entry, bound in zip(rated, found, strict=True) if bound <= SIGNIFICANCE}
        rated = [entry for entry in rated if entry.id not in bounds]
    there = store.with_examples([entry.id for entry in rated])
    tested = [entry for entry in rated if entry.id in there]
    if not tested or tested[0] is not rated[0]:
        return {}
    compared = len(tested)
    if compared > ties.MOST_PAIRED:
        # Each is held against the winner alone then, whoever else is.
        tested = [entry for entry in tested if entry.id in wanted or entry is tested[0]]
    kept = store.examples([entry.id for entry in tested])
    examples: list[Examples] = [statistics.unpack(kept[entry.id]) for entry in tested]
    contract = tested[0].scores[metric].contract
    observed = np.array([entry.row.score for entry in tested])
    # The test compares each with each; in a large study fewer resamples keep the answer within seconds.
    resamples = ties.RESAMPLES if compared <= _MANY_TRIALS else 500
    resampled = ties.resample(metric, examples, contract, resamples=resamples)
    p_values = ties.tie_p_values(
        observed,
        resampled,
        tested[0].row.score_n,
        higher_is_better=METRICS[metric].higher_is_better,
        compared=compared,
    )
    return bounds | {entry.id: float(p_value) for entry, p_value in zip(tested, p_values, strict=True)}


def _finals(study: StudyRow, trials: Sequence[TrialRow], scores: dict[int, dict[str, ScoreRow]]) -> list[Finalist]:
    """The configurations of the finals, best mean first."""
    metric = study.metric
    sign = 1 if study.higher_is_better else -1
    repeated: dict[int, list[TrialRow]] = {}
    for trial in trials:
        if trial.repeat_of is not None and metric in scores.get(trial.number, {}):
            repeated.setdefault(trial.repeat_of, []).append(trial)
    params = {trial.number: trial.params for trial in trials}
    rows = [
        _finalist(study.name, metric, sign, number, params[number], scores, repeats)
        for number, repeats in repeated.items()
    ]
    return sorted(rows, key=lambda row: (-sign * row.mean, row.trial))


def _finalist(
    study: str,
    metric: str,
    sign: int,
    number: int,
    params: dict[str, Any],
    scores: dict[int, dict[str, ScoreRow]],
    repeats: Sequence[TrialRow],
) -> Finalist:
    values = [scores[repeat.number][metric].value for repeat in repeats]
    mean = sum(values) / len(values)
    chosen = scores[number][metric].value
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else None
    return Finalist(
        study=study,
        trial=number,
        metric=metric,
        chosen_score=chosen,
        seeds=len(values),
        mean=mean,
        standard_deviation=spread,
        low=min(values),
        high=max(values),
        dropped=sign * (chosen - mean),
        repeats=[repeat.number for repeat in repeats],
        params=params,
    )


def finalists(board: Leaderboard, top: int) -> Iterator[RankedTrial]:
    """The `top` best rows of a leaderboard with different settings."""
    seen: list[dict[str, Any]] = []
    for row in board.rows:
        if row.params not in seen and len(seen) < top:
            seen.append(row.params)
            yield row
