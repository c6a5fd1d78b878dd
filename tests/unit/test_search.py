"""Optuna through our hands: states of the table, same seed same trials, clipped values, grids, retries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from hpsearch.records import TrialState
from hpsearch.search.record import recorded_trials
from hpsearch.search.samplers import BEST_SEEN, LATEST_SEEN, _History, clip_at_median
from hpsearch.search.study import OPTUNA_STATE, Search, first_suggestions
from hpsearch.spec.load import load_study, validate_study
from hpsearch.spec.parsing.yaml_file import parse_study
from hpsearch.spec.study import StudySpec
from hpsearch.store.store import Store

BASE = """name: s
task: causal_lm
data: {corpus: python_docs}
search:
  learning_rate: {min: 1e-4, max: 1e-1, scale: log}
  num_layers: {min: 1, max: 4}
  num_epochs: {min: 1, max: 9}
"""


def spec(tmp_path: Path, *overrides: str) -> StudySpec:
    file = tmp_path / "s.yaml"
    file.write_text(BASE)
    return load_study(file, overrides=overrides)


def study(search: dict[str, Any], sampler: str = "random") -> StudySpec:
    """A study of this search space alone."""
    text = json.dumps(
        {"name": "s", "task": "causal_lm", "data": {"corpus": "python_docs"}, "search": search, "sampler": sampler}
    )
    return validate_study(parse_study(text, source="s.yaml"), base=Path())


def loss_of(params: dict[str, Any]) -> float:
    """A bowl in log learning rate, a little better with depth."""
    return float((math.log10(params["learning_rate"]) + 2.5) ** 2 - 0.05 * params["num_layers"])


def optimise(search: Search, trials: int) -> list[dict[str, Any]]:
    tried = []
    for _ in range(trials):
        suggestion = search.ask()
        search.tell(suggestion.number, TrialState.COMPLETED, value=loss_of(suggestion.params), notes={})
        tried.append(suggestion.params)
    return tried


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "cmaes", "qmc"])
def test_the_same_seed_gives_the_same_trials(tmp_path: Path, sampler: str) -> None:
    study = spec(tmp_path, f"sampler={sampler}")
    once = optimise(Search(study, None), 14)
    assert optimise(Search(study, None), 14) == once
    assert optimise(Search(spec(tmp_path, f"sampler={sampler}", "seed=1"), None), 14) != once
    assert first_suggestions(study, 3) == once[:3] or sampler in ("tpe", "gp", "cmaes")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_a_model_searches_better_than_chance(tmp_path: Path, sampler: str) -> None:
    late = optimise(Search(spec(tmp_path, f"sampler={sampler}"), None), 40)[30:]
    chance = optimise(Search(spec(tmp_path, "sampler=random"), None), 40)[30:]
    assert sorted(map(loss_of, late))[5] < sorted(map(loss_of, chance))[5]


def test_a_grid_is_tried_once_and_then_exhausted(tmp_path: Path) -> None:
    study = spec(tmp_path, "sampler=grid", "search.learning_rate=[1e-3, 1e-2]", "search.num_epochs=3")
    search = Search(study, None)
    tried = []
    while not search.is_exhausted:
        suggestion = search.ask()
        search.tell(suggestion.number, TrialState.COMPLETED, value=1.0, notes={})
        tried.append(tuple(suggestion.params.values()))
    assert sorted(tried) == [(rate, layers) for rate in (1e-3, 1e-2) for layers in (1, 2, 3, 4)]


def test_conditional_settings_are_sampled_only_where_they_hold(tmp_path: Path) -> None:
    study = spec(tmp_path, "search.dropout={min: 0.0, max: 0.5, when: {num_layers: {min: 3}}}")
    for params in optimise(Search(study, None), 30):
        assert ("dropout" in params) == (params["num_layers"] >= 3)


@pytest.mark.parametrize(
    ("state", "optuna_state", "value"),
    [
        (TrialState.COMPLETED, OptunaState.COMPLETE, 2.5),
        (TrialState.OVERFIT, OptunaState.COMPLETE, 2.5),
        (TrialState.PLATEAU, OptunaState.COMPLETE, 2.5),
        (TrialState.UNPROMISING, OptunaState.PRUNED, 3.0),
        (TrialState.DIVERGED, OptunaState.PRUNED, None),
        (TrialState.INFEASIBLE, OptunaState.PRUNED, None),
        (TrialState.FAILED, OptunaState.FAIL, None),
        (TrialState.INTERRUPTED, OptunaState.WAITING, None),
    ],
)
def test_the_record_says_what_the_table_says(
    tmp_path: Path, state: TrialState, optuna_state: OptunaState, value: float | None
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    search = Search(spec(tmp_path), url)
    suggestion = search.ask()
    assert optuna.load_study(study_name="s", storage=url).trials[0].state is OptunaState.RUNNING
    for epoch, loss in enumerate([4.0, 2.5, 3.0], start=1):
        search.report(suggestion.number, step=epoch, value=loss)
    search.tell(suggestion.number, state, value=2.5, notes={"outcome": state.value})
    trial = optuna.load_study(study_name="s", storage=url).trials[0]
    assert trial.state is optuna_state
    assert trial.value == value
    assert trial.params == suggestion.params
    assert trial.intermediate_values == {1: 4.0, 2: 2.5, 3: 3.0}
    assert trial.user_attrs["outcome"] == state.value


def test_every_state_has_its_optuna_state() -> None:
    assert set(OPTUNA_STATE) == set(TrialState)


@pytest.mark.parametrize("rule", ["median", "percentile", "asha", "hyperband"])
def test_a_hopeless_trial_is_stopped_after_the_warm_up(tmp_path: Path, rule: str) -> None:
    chosen = spec(tmp_path, f"prune.unpromising={rule}")
    per_epoch = chosen.evaluations_per_epoch
    assert per_epoch > 1
    search = Search(chosen, None)
    steps = range(1, 9 * per_epoch + 1)
    for _ in range(12):
        number = search.ask().number
        for step in steps:
            search.report(number, step=step, value=3.0 * per_epoch / step)
        search.tell(number, TrialState.COMPLETED, value=1 / 3, notes={})
    stopped = []
    for _ in range(6):
        number = search.ask().number
        step = next((step for step in steps if search.report(number, step=step, value=99.0)), 99 * per_epoch)
        search.tell(number, TrialState.UNPROMISING, value=None, notes={})
        stopped.append(step / per_epoch)
    assert min(stopped) < 9
    if rule in ("median", "percentile"):
        assert stopped == [3] * 6, "a fifth of the longest run is 2 epochs"


def test_no_rule_stops_nothing(tmp_path: Path) -> None:
    search = Search(spec(tmp_path, "prune.unpromising=none"), None)
    optimise(search, 12)
    number = search.ask().number
    assert not any(search.report(number, step=epoch, value=99.0) for epoch in range(1, 10))


def trial(value: float | None, state: OptunaState = OptunaState.COMPLETE) -> optuna.trial.FrozenTrial:
    return create_trial(state=state, value=value)


def test_bad_values_are_clipped_at_the_median_and_diverged_trials_put_there() -> None:
    trials = [
        trial(1.0),
        trial(2.0),
        trial(90.0),
        trial(None, OptunaState.PRUNED),
        trial(5.0, OptunaState.PRUNED),
        trial(None, OptunaState.FAIL),
    ]
    seen = clip_at_median(trials)
    assert [(one.state, one.value) for one in seen] == [
        (OptunaState.COMPLETE, 1.0), (OptunaState.COMPLETE, 2.0), (OptunaState.COMPLETE, 2.0),
        (OptunaState.COMPLETE, 2.0), (OptunaState.PRUNED, 5.0), (OptunaState.FAIL, None),
    ]  # fmt: skip
    assert [one.value for one in trials] == [1.0, 2.0, 90.0, None, 5.0, None], "the record itself is not changed"
    assert clip_at_median(trials[3:4]) == trials[3:4]


def test_a_gaussian_process_is_not_wrecked_by_outliers(tmp_path: Path) -> None:
    search = Search(spec(tmp_path, "sampler=gp"), None)
    tried = []
    for _ in range(30):
        suggestion = search.ask()
        if suggestion.params["learning_rate"] > 2e-2:
            search.tell(suggestion.number, TrialState.DIVERGED, value=None, notes={})
        else:
            value = loss_of(suggestion.params) + (1e6 if suggestion.params["learning_rate"] < 3e-4 else 0)
            search.tell(suggestion.number, TrialState.COMPLETED, value=value, notes={})
        tried.append(suggestion.params["learning_rate"])
    assert sum(3e-4 < rate < 2e-2 for rate in tried[20:]) >= 7


def test_a_study_goes_on_from_its_store_with_all_it_learned(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = spec(tmp_path)
    before = optimise(Search(study, url), 12)
    search = Search(study, url)
    after = optimise(search, 3)
    assert not any(params in before for params in after)
    loaded = optuna.load_study(study_name="s", storage=url)
    assert [trial.number for trial in loaded.trials] == list(range(15))
    assert loaded.best_value == min(map(loss_of, [*before, *after]))


def test_an_interrupted_trial_keeps_its_number_settings_and_curve(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    search = Search(spec(tmp_path), url)
    first = search.ask()
    search.report(first.number, step=1, value=4.0)
    search.tell(first.number, TrialState.INTERRUPTED, value=None, notes={})
    again = Search(spec(tmp_path), url)
    assert again.unfinished == [first.number]
    assert again.ask().number == 1, "the queue is ours: what waits is not asked for"
    assert again.ask_again(first.number) == first
    again.tell(first.number, TrialState.COMPLETED, value=2.0, notes={})
    trial = optuna.load_study(study_name="s", storage=url).trials[0]
    assert (trial.state, trial.value, trial.intermediate_values) == (OptunaState.COMPLETE, 2.0, {1: 4.0})


def test_what_a_crash_left_running_is_found(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    lost = Search(spec(tmp_path), url).ask()
    assert Search(spec(tmp_path), url).unfinished == [lost.number]


def test_every_write_may_be_done_twice(tmp_path: Path) -> None:
    """A connection that breaks at a commit does not say whether it was done."""
    url = f"sqlite:///{tmp_path}/s.db"

    def twice(write: Callable[[], None]) -> None:
        write()
        write()

    search = Search(spec(tmp_path), url, write=twice)
    tried = optimise(search, 4)
    loaded = optuna.load_study(study_name="s", storage=url)
    assert [trial.params for trial in loaded.trials] == tried
    assert {trial.state for trial in loaded.trials} == {OptunaState.COMPLETE}


def test_a_wider_space_keeps_what_was_learned(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    narrow = ["search.learning_rate={min: 1e-3, max: 1e-2, scale: log}", "search.num_layers=[2, 3]"]
    before = optimise(Search(spec(tmp_path, *narrow), url), 12)
    wide = spec(tmp_path, "search.num_layers=[1, 2, 3, 4]")
    search = Search(wide, url)
    after = optimise(search, 12)
    assert {params["num_layers"] for params in after} - {2, 3}
    assert not any(params in before for params in after)
    loaded = optuna.load_study(study_name="s", storage=url)
    assert [trial.params for trial in loaded.trials] == [*before, *after]
    assert len({str(trial.distributions) for trial in loaded.trials}) == 1, "the sampler sees one space"


def test_no_pickle_reaches_the_store(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    optimise(Search(spec(tmp_path, "sampler=cmaes"), url), 14)
    attributes = {key for one in optuna.load_study(study_name="s", storage=url).trials for key in one.system_attrs}
    assert not any(key.startswith("cma") for key in attributes)


def test_given_settings_are_tried_first_and_once_over_launches(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = spec(tmp_path)
    starts = [{"learning_rate": 0.003, "num_layers": 2, "num_epochs": 5}, {"learning_rate": 0.01}, {"num_layers": 4}]
    first = optimise(Search(study, url, starts=starts), 2)
    assert first[0] == starts[0]
    assert first[1]["learning_rate"] == 0.01
    assert set(first[1]) == set(starts[0]), "what was left open is sampled"
    later = optimise(Search(study, url, starts=[*starts, {"num_epochs": 9}]), 4)
    assert later[0]["num_layers"] == 4
    assert later[1]["num_epochs"] == 9
    assert not any(params["learning_rate"] in (0.003, 0.01) for params in later)
    there = optuna.load_study(study_name="s", storage=url)
    assert [trial.params for trial in there.trials] == [*first, *later]


def best_loss(study: StudySpec, trials: int) -> float:
    return min(loss_of(params) for params in optimise(Search(study, None, starts=[study.space.priors]), trials))


def with_prior(tmp_path: Path, seed: int, prior: float, sampler: str = "tpe") -> StudySpec:
    rate = f"search.learning_rate={{min: 1e-4, max: 1e-1, scale: log, prior: {prior}}}"
    return spec(tmp_path, rate, f"seed={seed}", f"sampler={sampler}")


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_early_draws_gather_around_a_prior_and_some_do_not(tmp_path: Path, sampler: str) -> None:
    near, draws = 0, []
    for seed in range(20):
        draws += optimise(Search(with_prior(tmp_path, seed, 1e-3, sampler), None), 8)
    distances = [abs(math.log10(params["learning_rate"]) + 3) for params in draws]
    near = sum(distance < 0.75 for distance in distances) / len(distances)
    assert 0.5 < near < 0.85, "half of them by the prior alone; chance would have half as many"
    assert max(distances) > 1.8
    assert sum(params["num_layers"] >= 3 for params in draws) / len(draws) == pytest.approx(0.5, abs=0.12)


def test_a_good_prior_helps_early_and_a_bad_one_does_not_last(tmp_path: Path) -> None:
    seeds = range(12)
    good = [best_loss(with_prior(tmp_path, seed, 3e-3), 8) for seed in seeds]
    none = [
        min(loss_of(params) for params in optimise(Search(spec(tmp_path, f"seed={seed}"), None), 8)) for seed in seeds
    ]
    assert sum(good) < sum(none)
    bad = [best_loss(with_prior(tmp_path, seed, 1e-1), 40) for seed in seeds]
    late = [
        min(loss_of(params) for params in optimise(Search(spec(tmp_path, f"seed={seed}"), None), 40)) for seed in seeds
    ]
    assert sum(bad) / len(bad) < sum(late) / len(late) + 0.02


def test_priors_of_whole_numbers_steps_and_choices_stay_in_the_space(tmp_path: Path) -> None:
    study = spec(
        tmp_path,
        "search.num_layers={min: 1, max: 4, prior: 4}",
        "search.num_epochs={min: 1, max: 8, step: 3, prior: 7}",
        "search.batch_size={values: [8, 16, 32], prior: 16}",
        "search.dropout={min: 0.0, max: 0.35, step: 0.1, prior: 0.3}",
    )
    drawn = optimise(Search(study, None, starts=[study.space.priors]), 30)
    assert {name: drawn[0][name] for name in study.space.priors} == {
        "num_layers": 4, "num_epochs": 7, "batch_size": 16, "dropout": 0.3,
    }  # fmt: skip
    assert {params["num_epochs"] for params in drawn} <= {1, 4, 7}
    assert {params["batch_size"] for params in drawn} <= {8, 16, 32}
    assert all(isinstance(params["num_layers"], int) and 1 <= params["num_layers"] <= 4 for params in drawn)
    assert all(any(math.isclose(params["dropout"], step / 10) for step in range(4)) for params in drawn)


@pytest.mark.parametrize("objective", ["loss", "bleu"])
def test_a_sampler_of_a_large_study_sees_the_best_the_latest_and_the_open(objective: str) -> None:
    history = _History()
    trials = []
    for number in range(3000):
        value = float((number * 7919) % 3001)
        state = (
            OptunaState.RUNNING
            if number in (5, 2999)
            else OptunaState.FAIL
            if number % 50 == 0
            else OptunaState.COMPLETE
        )
        trial = create_trial(state=state, value=value if state is OptunaState.COMPLETE else None)
        trial.number = number
        trials.append(trial)
        if number in (100, LATEST_SEEN, 2500, 2999):
            seen = history.seen(list(trials), maximise=objective == "bleu")
            assert [trial.number for trial in seen] == sorted({trial.number for trial in seen})
            assert [trial.number for trial in seen][-LATEST_SEEN:] == list(range(len(trials)))[-LATEST_SEEN:]
            assert len(seen) <= LATEST_SEEN + BEST_SEEN + 102
    ended = [trial for trial in trials if trial.state is OptunaState.COMPLETE]
    best = sorted(ended, key=lambda trial: trial.value or 0.0, reverse=objective == "bleu")[:25]
    assert {trial.number for trial in best} <= {trial.number for trial in seen}, "TPE's own choice of the best is whole"
    assert 5 in {trial.number for trial in seen}
    trials[5] = create_trial(state=OptunaState.COMPLETE, value=1.5)
    trials[5].number = 5
    (again,) = [trial for trial in history.seen(list(trials), maximise=objective == "bleu") if trial.number == 5]
    assert again.value == 1.5, "one that ends late is seen as it is"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_the_first_trials_are_spread_evenly_over_every_setting(tmp_path: Path, sampler: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(f"{BASE}  batch_size: [8, 16, 32, 64, 128]\n")
    tried = first_suggestions(load_study(file, overrides=[f"sampler={sampler}"]), 10)
    tenths = sorted(int(10 * math.log10(one["learning_rate"] / 1e-4) / 3) for one in tried)
    assert tenths == list(range(10)), "one learning rate in each tenth of its range"
    assert sorted(one["batch_size"] for one in tried) == [8, 8, 16, 16, 32, 32, 64, 64, 128, 128]
    assert {one["num_layers"] for one in tried} == {1, 2, 3, 4}
    assert {one["num_epochs"] for one in tried} <= set(range(1, 10))
    assert len({one["num_epochs"] for one in tried}) >= 8
    assert len({(one["num_layers"], one["batch_size"], one["num_epochs"]) for one in tried}) > 5, "and not in step"
    other = first_suggestions(load_study(file, overrides=[f"sampler={sampler}", "seed=1"]), 10)
    assert [one["batch_size"] for one in other] != [one["batch_size"] for one in tried]


def test_a_study_that_goes_on_keeps_to_the_spread_it_began_with(tmp_path: Path) -> None:
    study = spec(tmp_path)
    url = f"sqlite:///{tmp_path}/s.db"
    whole = first_suggestions(study, 10)
    found = []
    for _ in range(2):
        with closing(Search(study, url)) as search:
            for _ in range(5):
                suggestion = search.ask()
                found.append(suggestion.params)
                search.tell(suggestion.number, TrialState.COMPLETED, value=1.0, notes={})
    assert found == whole


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "grid"])
def test_no_setting_is_tried_twice(sampler: str) -> None:
    """A space of six settings has six trials, whatever proposes them, and then it is exhausted."""
    wanted = {"batch_size": [8, 16], "num_layers": {"min": 1, "max": 3}}
    search = Search(study(search=wanted, sampler=sampler), None)
    seen = []
    while not search.is_exhausted:
        suggestion = search.ask()
        seen.append((suggestion.params["batch_size"], suggestion.params["num_layers"]))
        search.tell(suggestion.number, TrialState.COMPLETED, value=float(len(seen) % 3), notes={})
    assert sorted(seen) == [(size, layers) for size in (8, 16) for layers in (1, 2, 3)]


def test_a_setting_that_failed_may_be_tried_again_and_conditions_count() -> None:
    conditional = {
        "optimizer": ["adamw", "muon"],
        "adam_beta2": {"values": [0.9, 0.99], "when": {"optimizer": "adamw"}},
    }
    search = Search(study(search=conditional), None)
    first = search.ask()
    search.tell(first.number, TrialState.FAILED, value=None, notes={})
    seen = []
    while not search.is_exhausted:
        seen.append(search.ask().params)
    assert len(seen) == 3
    assert first.params in seen
    assert all(("adam_beta2" in params) == (params["optimizer"] == "adamw") for params in seen)


def test_a_study_that_goes_on_knows_what_was_tried_before(store_url: str) -> None:
    wanted = {"batch_size": [8, 16, 32, 64]}
    Store(store_url, create=True)
    seen = []
    for _ in range(4):
        search = Search(study(search=wanted), store_url)
        suggestion = search.ask()
        seen.append(suggestion.params["batch_size"])
        search.tell(suggestion.number, TrialState.COMPLETED, value=1.0, notes={})
        search.close()
    assert sorted(seen) == [8, 16, 32, 64]
    assert [trial.params["batch_size"] for trial in recorded_trials(store_url, "s").values()] == seen
    assert Search(study(search=wanted), store_url).is_exhausted


def test_where_nothing_is_searched_there_is_one_trial() -> None:
    search = Search(study(search={}), None)
    assert search.ask().params == {}
    assert search.is_exhausted


def test_a_start_that_was_tried_is_not_tried_again() -> None:
    starts = [{"batch_size": 8}, {"batch_size": 8}, {"batch_size": 16}]
    search = Search(study(search={"batch_size": [8, 16, 32]}), None, starts=starts)
    assert [search.ask().params["batch_size"] for _ in range(3)] == [8, 16, 32]


def test_a_grid_whose_trials_fail_is_tried_again_and_told_in_any_order(tmp_path: Path) -> None:
    search = Search(spec(tmp_path, "sampler=grid", "search={num_layers: [1, 2, 3]}"), None)
    first, second, third = (search.ask().number for _ in range(3))
    search.tell(first, TrialState.FAILED, value=None, notes={})
    again = search.ask()
    assert again.params == search.params(first)
    for number in (second, again.number, third):
        search.tell(number, TrialState.COMPLETED, value=1.0, notes={})
    assert search.is_exhausted
