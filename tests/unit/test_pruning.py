"""The verdict, on curve families and as properties."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hpsearch.pruning.overfitting import Judgement, Verdict, best_evaluation, judge, mann_kendall_z
from hpsearch.spec.sections import OverfitRule

RULE = OverfitRule()


class P(NamedTuple):
    train_loss: float
    valid_loss: float


def run(train: Sequence[float], valid: Sequence[float], rule: OverfitRule = RULE) -> tuple[int, Judgement]:
    """Train under the rule: the evaluation it stopped at (or the last), and the judgement there."""
    curve = [P(t, v) for t, v in zip(train, valid, strict=True)]
    for seen in range(1, len(curve) + 1):
        judgement = judge(curve[:seen], len(curve), rule)
        if judgement.stops:
            return seen, judgement
    return len(curve), judgement


def falling(n: int, start: float = 5.0, end: float = 1.0) -> list[float]:
    return [end + (start - end) * math.exp(-3 * i / n) for i in range(n)]


def u_shaped(n: int, turn: int, depth: float = 2.0, slope: float = 0.03) -> list[float]:
    """Falls until `turn` (0-based), then rises."""
    return [depth + (2 * (1 - i / turn) ** 2 if i < turn else slope * (i - turn)) for i in range(n)]


def jitter(values: Sequence[float], sigma: float, seed: int) -> list[float]:
    noise = random.Random(seed)
    return [value + noise.gauss(0, sigma) for value in values]


FLAT = [1.0] * 40


@pytest.mark.parametrize(
    ("train", "valid", "verdict", "latest"),
    [
        pytest.param(falling(40), u_shaped(40, 10), Verdict.OVERFITTING, 17, id="overfits early"),
        pytest.param(falling(40), u_shaped(40, 28), Verdict.OVERFITTING, 35, id="overfits late"),
        pytest.param(falling(40), jitter(u_shaped(40, 12, slope=0.05), 0.02, 1), Verdict.OVERFITTING, 22, id="noisily"),
        pytest.param(FLAT, [2.0] * 40, Verdict.PLATEAU, 11, id="plateau"),
        pytest.param(
            [1 + 0.1 * i for i in range(8)] + [1.8] * 32, u_shaped(40, 2), Verdict.DIVERGING, 9, id="both rise"
        ),
        pytest.param([1.0, 1.0, math.nan] + [1.0] * 37, [2.0] * 40, Verdict.DIVERGING, 3, id="training NaN"),
        pytest.param([1.0] * 40, [2.0, math.inf] + [2.0] * 38, Verdict.DIVERGING, 2, id="validation inf"),
        pytest.param([5.0, 4.0, 30.0] + [30.0] * 37, [5.0] * 40, Verdict.DIVERGING, 5, id="exploding"),
    ],
)
def test_a_run_that_has_turned_is_stopped(
    train: list[float], valid: list[float], verdict: Verdict, latest: int
) -> None:
    stopped_at, judgement = run(train, valid)
    assert judgement.verdict == verdict
    assert stopped_at <= latest


@pytest.mark.parametrize(
    "valid",
    [
        pytest.param(falling(40), id="falls to the end"),
        pytest.param([6.0, 6.4, 6.8, 6.5, 5.5, *falling(35, 5.0)], id="warm-up bump"),
        pytest.param(
            [3 - i * 0.05 for i in range(14)] + [2.3 + i * 0.02 for i in range(5)] + falling(21, 2.35),
            id="double descent",
        ),
        pytest.param([*jitter(falling(30, 5, 3), 0.01, 3), *falling(10, 3.0, 1.5)], id="late learning-rate decay"),
    ],
)
def test_a_run_that_still_gains_is_left_alone(valid: list[float]) -> None:
    stopped_at, judgement = run(falling(40), valid)
    assert stopped_at == 40
    assert judgement.verdict == Verdict.HEALTHY


def test_the_warm_up_is_a_fifth_of_the_run() -> None:
    rising = [P(5 - i, 1 + i) for i in range(4)] + [P(1.0, 9.0)] * 36
    for seen in range(1, 8):
        assert judge(rising[:seen], 40, RULE).verdict == Verdict.TOO_EARLY
    assert judge(rising[:8], 40, RULE).stops


def test_training_loss_that_falls_in_steps_is_falling() -> None:
    # As measured on a translation study: flat within an epoch of 4 evaluations, lower in the next.
    train = [3.0 - 0.3 * (index // 4) + 0.02 * (index % 4) for index in range(40)]
    curve = [P(t, v) for t, v in zip(train, u_shaped(40, 20), strict=True)]
    blind = [judge(curve[:seen], 40, RULE) for seen in range(1, 41)]
    aware = [judge(curve[:seen], 40, RULE, evaluations_per_epoch=4) for seen in range(1, 41)]
    assert next(one for one in aware if one.stops).verdict == Verdict.OVERFITTING
    assert next(one for one in blind if one.stops).verdict == Verdict.PLATEAU


def test_a_flat_sawtooth_is_a_plateau() -> None:
    train = [3.0 + 0.1 * (index % 4) for index in range(40)]
    valid = [2.0 + 0.01 * index for index in range(40)]
    verdicts = [
        judge([P(t, v) for t, v in zip(train[:seen], valid, strict=False)], 40, RULE, evaluations_per_epoch=4)
        for seen in range(1, 41)
    ]
    assert next(one for one in verdicts if one.stops).verdict == Verdict.PLATEAU


def test_an_empty_curve_is_too_early() -> None:
    judgement = judge([], 40, RULE)
    assert judgement.verdict == Verdict.TOO_EARLY
    assert judgement.evidence.best_evaluation is None


def test_every_threshold_is_a_setting() -> None:
    valid = u_shaped(40, 12)
    default, _ = run(falling(40), valid)
    assert run(falling(40), valid, OverfitRule(window=5))[0] < default
    assert run(falling(40), valid, OverfitRule(z=2.9))[0] > default
    assert run(falling(40), valid, OverfitRule(warmup=0.8))[0] == 32
    assert run(falling(40), valid, OverfitRule(patience=2))[0] < default
    exploded = [1.0] + [1.4] * 39
    assert run(exploded, falling(40))[1].verdict == Verdict.HEALTHY
    assert run(exploded, falling(40), OverfitRule(explode_factor=1.3))[1].verdict == Verdict.DIVERGING


def test_a_peak_of_the_training_loss_is_no_explosion() -> None:
    train = falling(40)
    train[3:5] = [30.0, 30.0]
    assert run(train, falling(40))[1].verdict == Verdict.HEALTHY


def _under_decay(train: Sequence[float], valid: Sequence[float], left: float) -> Judgement:
    return judge([P(t, v) for t, v in zip(train, valid, strict=True)], 40, RULE, decay_to_come=left)


@pytest.mark.parametrize(
    ("train", "valid", "verdict"),
    [
        pytest.param([1.0] * 20, [2.0] * 20, Verdict.PLATEAU, id="stands still"),
        pytest.param([1 + 0.02 * i for i in range(20)], u_shaped(20, 10), Verdict.DIVERGING, id="both rise"),
        pytest.param(falling(20), falling(8, 5, 2) + [2.1] * 12, Verdict.OVERFITTING, id="fits training alone"),
    ],
)
def test_a_run_that_stands_still_waits_for_the_decay(train: list[float], valid: list[float], verdict: Verdict) -> None:
    waits = _under_decay(train, valid, 0.5)
    assert (waits.verdict, waits.evidence.rule) == (Verdict.HEALTHY, "decay to come")
    assert _under_decay(train, valid, 0.1).verdict == verdict
    assert _under_decay(train, valid, 0.0).verdict == verdict


def test_overfitting_waits_for_no_decay() -> None:
    judgement = _under_decay(falling(20), u_shaped(20, 10), 0.9)
    assert (judgement.verdict, judgement.evidence.rule) == (Verdict.OVERFITTING, "rising trend")


def test_the_evidence_names_the_best_checkpoint_and_the_trend() -> None:
    stopped_at, judgement = run(falling(40), u_shaped(40, 12))
    evidence = judgement.evidence
    assert evidence.best_evaluation == 13
    assert evidence.best_valid_loss == pytest.approx(2.0)
    assert evidence.since_best == stopped_at - 13
    assert evidence.rule == "rising trend"
    assert evidence.valid_trend_z is not None
    assert evidence.valid_trend_z > RULE.z
    assert evidence.train_trend_z is not None
    assert evidence.train_trend_z < -RULE.z


def test_evidence_that_is_no_number_stays_json() -> None:
    evidence = judge([P(math.nan, math.inf)], 40, RULE).evidence.as_dict()
    assert evidence["last_valid_loss"] == "inf"
    assert evidence["last_train_loss"] == "nan"


losses = st.floats(0.01, 20, allow_nan=False)


@given(st.lists(losses, min_size=2, max_size=12, unique=True))
def test_the_trend_is_kendalls_tau_against_time(values: list[float]) -> None:
    tau = stats.kendalltau(range(len(values)), values).statistic
    n = len(values)
    score = tau * n * (n - 1) / 2
    assert mann_kendall_z(values) == pytest.approx(score / math.sqrt(n * (n - 1) * (2 * n + 5) / 18))


@given(st.lists(st.tuples(losses, losses), min_size=1, max_size=40), st.floats(0.01, 100))
def test_the_unit_of_the_losses_does_not_matter(pairs: list[tuple[float, float]], unit: float) -> None:
    curve = [P(t, v) for t, v in pairs]
    scaled = [P(t * unit, v * unit) for t, v in pairs]
    if len({v for _, v in pairs}) == len({v * unit for _, v in pairs}) and len({t for t, _ in pairs}) == len(
        {t * unit for t, _ in pairs}
    ):
        ratio = pairs[-1][0] / pairs[0][0]
        if abs(ratio - RULE.explode_factor) > 1e-6:
            assert judge(curve, 40, RULE).verdict == judge(scaled, 40, RULE).verdict


@given(st.lists(st.one_of(losses, st.just(math.nan), st.just(math.inf)), min_size=1, max_size=30))
def test_the_best_checkpoint_is_the_first_lowest_finite_loss(values: list[float]) -> None:
    best = best_evaluation([P(1.0, value) for value in values])
    finite = [value for value in values if math.isfinite(value)]
    assert best == (values.index(min(finite)) + 1 if finite else None)


@given(st.lists(losses, min_size=40, max_size=40, unique=True))
def test_a_falling_validation_loss_is_never_stopped(values: list[float]) -> None:
    valid = sorted(values, reverse=True)
    assert run(falling(40), valid)[0] == 40


@given(st.integers(0, 10_000))
def test_overfitting_is_caught_within_eight_evaluations_of_its_onset(seed: int) -> None:
    turn = random.Random(seed).randrange(8, 30)
    valid = jitter(u_shaped(40, turn, slope=0.05), 0.005, seed)
    stopped_at, judgement = run(jitter(falling(40), 0.005, seed + 1), valid)
    assert judgement.verdict == Verdict.OVERFITTING
    assert turn < stopped_at <= turn + 9
