"""The overfitting rule beside other stop rules: catches, delay, false stops, epochs saved.

    python benchmarks/verdict.py [--tables FOLDER] [--seeds N]

Two parts. The first draws curve families with a known truth (where validation loss turns for good, or that it never
does) and counts, for each rule, how many turns it catches within 8 evaluations, how long it takes, and how many runs
that still gain it stops. The second replays published learning curves: epochs saved, and how much of the best
validation value is lost, in per cent of the spread between the best and the median run of the table.

What the tables are and where they are from: `benchmarks/curves.py`. None of them is part of this project.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import curves
import numpy as np
import optuna
import record

from hpsearch.pruning.overfitting import judge
from hpsearch.spec.sections import OverfitRule

WITHIN = 12
"""Evaluations after the turn within which a stop counts as a catch."""


@dataclass(frozen=True)
class Point:
    train_loss: float
    valid_loss: float
    decay_to_come: float = 0.0
    """Part of the learning rate's decay that is left."""


Curve = list[Point]
Rule = Callable[[Curve], int]
"""The number of evaluations after which a rule stops a whole curve; its length when it never does."""


def first(curve: Curve, stops: Callable[[int], bool]) -> int:
    return next((seen for seen in range(1, len(curve) + 1) if stops(seen)), len(curve))


def ours(rule: OverfitRule, *, knows_schedule: bool = True) -> Rule:
    def stops(curve: Curve, seen: int) -> bool:
        left = curve[seen - 1].decay_to_come if knows_schedule else 0.0
        return judge(curve[:seen], len(curve), rule, decay_to_come=left).stops

    return lambda curve: first(curve, lambda seen: stops(curve, seen))


def patience(evaluations: int) -> Rule:
    """Stop after so many evaluations without a new best (Keras EarlyStopping)."""

    def stop(curve: Curve) -> int:
        best, since = math.inf, 0
        for seen, point in enumerate(curve, start=1):
            best, since = (point.valid_loss, 0) if point.valid_loss < best else (best, since + 1)
            if since >= evaluations:
                return seen
        return len(curve)

    return stop


def optuna_patient(evaluations: int) -> Rule:
    """Optuna's own PatientPruner with no pruner inside, fed as `trial.report` feeds it."""

    def stop(curve: Curve) -> int:
        pruner = optuna.pruners.PatientPruner(None, patience=evaluations)
        study = optuna.create_study(pruner=pruner)
        trial = study.ask()
        for seen, point in enumerate(curve, start=1):
            trial.report(point.valid_loss, seen)
            if trial.should_prune():
                return seen
        return len(curve)

    return stop


def generalization_loss(alpha: float) -> Rule:
    """Prechelt's GL_alpha: loss more than alpha per cent above its best (Early Stopping - But When?, 1998)."""

    def stop(curve: Curve) -> int:
        best = math.inf
        for seen, point in enumerate(curve, start=1):
            best = min(best, point.valid_loss)
            if 100 * (point.valid_loss / best - 1) > alpha:
                return seen
        return len(curve)

    return stop


def progress_quotient(alpha: float, strip: int = 5) -> Rule:
    """Prechelt's PQ_alpha over strips of training."""

    def stops(curve: Curve, seen: int) -> bool:
        if seen < strip or seen % strip:
            return False
        best = min(point.valid_loss for point in curve[:seen])
        loss = 100 * (curve[seen - 1].valid_loss / best - 1)
        train = [point.train_loss for point in curve[seen - strip : seen]]
        progress = 1000 * (sum(train) / (strip * min(train)) - 1)
        return loss / max(progress, 1e-12) > alpha

    return lambda curve: first(curve, lambda seen: stops(curve, seen))


def rising_strips(strips: int, strip: int = 5) -> Rule:
    """Prechelt's UP_s: validation loss rose over s strips in a row."""

    def stops(curve: Curve, seen: int) -> bool:
        if seen % strip or seen < strip * (strips + 1):
            return False
        ends = [curve[seen - 1 - strip * back].valid_loss for back in range(strips + 1)]
        return all(later > earlier for later, earlier in pairwise(ends))

    return lambda curve: first(curve, lambda seen: stops(curve, seen))


RULES: dict[str, Rule] = {
    "hpsearch (default)": ours(OverfitRule()),
    "hpsearch, schedule not known": ours(OverfitRule(), knows_schedule=False),
    "Optuna PatientPruner(10)": optuna_patient(10),
    "patience 3": patience(3),
    "patience 5": patience(5),
    "patience 10": patience(10),
    "Prechelt GL_5": generalization_loss(5),
    "Prechelt PQ_0.5": progress_quotient(0.5),
    "Prechelt UP_2": rising_strips(2),
}


# Curve families with a known truth


@dataclass(frozen=True)
class Case:
    curve: Curve
    turn: int | None
    """Evaluation after which validation loss gains no more; None when the run gains to its end."""


def _noisy(train: Sequence[float], valid: Sequence[float], sigma: float, rng: random.Random) -> Curve:
    return [Point(t + rng.gauss(0, sigma), v + rng.gauss(0, sigma)) for t, v in zip(train, valid, strict=True)]


def _decay(count: int, start: float, end: float, rate: float) -> list[float]:
    return [end + (start - end) * math.exp(-rate * index / count) for index in range(count)]


def _turning(count: int, turn: int, rng: random.Random) -> list[float]:
    best, slope = rng.uniform(2, 4), rng.uniform(0.01, 0.06)
    return [best + (2 * (1 - i / turn) ** 2 if i < turn else slope * (i - turn)) for i in range(count)]


def overfits(earliest: float, latest: float, sigma: float) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        count = 40
        turn = rng.randrange(int(earliest * count), int(latest * count))
        return Case(_noisy(_decay(count, 6, 0.5, 3), _turning(count, turn, rng), sigma, rng), turn + 1)

    return draw


def plateaus(rng: random.Random) -> Case:
    """Both losses stand still, but for noise, from some evaluation on."""
    onset = rng.randrange(10, 24)
    valid = _decay(onset, 6, 2.5, 6) + [2.49] * (40 - onset)
    train = _decay(onset, 6, 2.0, 6) + [1.99] * (40 - onset)
    return Case(_noisy(train, valid, 0.005, rng), onset)


def diverges(rng: random.Random) -> Case:
    """Both losses rise slowly from some evaluation on."""
    turn = rng.randrange(8, 28)
    rise = [0.04 * index for index in range(40 - turn)]
    valid = _decay(turn, 6, 3, 4) + [3.0 + more for more in rise]
    train = _decay(turn, 6, 2.5, 4) + [2.5 + more for more in rise]
    return Case(_noisy(train, valid, 0.005, rng), turn)


def breaks(rng: random.Random) -> Case:
    """Both losses are no number from some evaluation on."""
    turn = rng.randrange(2, 28)
    curve = _noisy(_decay(40, 6, 1, 3), _decay(40, 6, 2, 3), 0.005, rng)
    return Case([*curve[:turn], *[Point(math.nan, math.nan)] * (40 - turn)], turn)


def gains(shape: Callable[[random.Random], list[float]], sigma: float) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        valid = shape(rng)
        return Case(_noisy(_decay(len(valid), 6, 1, 3), valid, sigma, rng), None)

    return draw


def _bump(rng: random.Random) -> list[float]:
    rise = [6 + 0.3 * i for i in range(rng.randrange(2, 6))]
    return rise + _decay(40 - len(rise), 6, 2, 4)


def _double_descent(rng: random.Random) -> list[float]:
    down, up = rng.randrange(10, 15), rng.randrange(3, 6)
    low = 3.0
    first_fall = [low + 2 * (1 - i / down) ** 2 for i in range(down)]
    rise = [low + 0.03 * (i + 1) for i in range(up)]
    return first_fall + rise + _decay(40 - down - up, rise[-1], 2, 3)


def _late_decay(rng: random.Random) -> list[float]:
    flat = rng.randrange(24, 32)
    return _decay(flat, 6, 3, 5) + _decay(40 - flat, 3, 2.2, 4)


FAMILIES: dict[str, Callable[[random.Random], Case]] = {
    "overfits early": overfits(0.2, 0.4, 0.005),
    "overfits late": overfits(0.5, 0.75, 0.005),
    "overfits noisily": overfits(0.2, 0.7, 0.03),
    "plateau": plateaus,
    "divergence": diverges,
    "NaN": breaks,
    "gains": gains(lambda rng: _decay(40, 6, rng.uniform(1, 3), rng.uniform(2, 5)), 0.005),
    "gains noisily": gains(lambda rng: _decay(40, 6, rng.uniform(1, 3), rng.uniform(2, 4)), 0.03),
    "warm-up bump": gains(_bump, 0.005),
    "double descent": gains(_double_descent, 0.005),
    "late decay": gains(_late_decay, 0.005),
}


def families(seeds: int) -> None:
    cases = {name: [draw(random.Random(f"{name}{seed}")) for seed in range(seeds)] for name, draw in FAMILIES.items()}
    print(f"curve families: {seeds} seeded curves each, 40 evaluations")
    print(f"caught: stopped 0 to {WITHIN} evaluations after the turn; false stops: runs ended that still gain")
    print(
        f"{'rule':<30} {'caught':>7} {'delay':>6} {'early':>6} {'missed':>7} {'false stops':>12}"
        "   by family (caught or false)"
    )
    for name, rule in RULES.items():
        caught = early = missed = turning = false = gaining = 0
        delays: list[int] = []
        by_family = []
        for members in cases.values():
            hits = 0
            for case in members:
                stopped = rule(case.curve)
                if case.turn is None:
                    gaining += 1
                    hits += stopped < len(case.curve)
                    continue
                turning += 1
                early += stopped < case.turn
                if case.turn <= stopped <= case.turn + WITHIN:
                    hits += 1
                    delays.append(stopped - case.turn)
                missed += stopped > case.turn + WITHIN
            if members[0].turn is None:
                false += hits
            else:
                caught += hits
            by_family.append(f"{hits / len(members):.0%}")
        delay = f"{statistics.mean(delays):.1f}" if delays else "-"
        print(
            f"{name:<30} {caught / turning:>7.1%} {delay:>6} {early / turning:>6.1%} {missed / turning:>7.1%} "
            f"{false / gaining:>12.1%}   {' '.join(f'{share:>5}' for share in by_family)}"
        )
    print(f"families: {', '.join(FAMILIES)}")


# Published curves


def published(table: curves.Table) -> list[Curve]:
    """The runs of a table that are long enough to be judged."""
    # Without training losses falling ones leave the choice of when to stop to the validation loss.
    train = table.train or [np.arange(len(valid), 0.0, -1.0) for valid in table.valid]
    runs = [
        [
            Point(float(one), float(other), table.decay_to_come(run, evaluation))
            for evaluation, (one, other) in enumerate(zip(*both, strict=True), start=1)
        ]
        for run, both in enumerate(zip(train, table.valid, strict=True))
    ]
    return [curve for curve in runs if len(curve) >= curves.SHORTEST]


def _job(job: tuple[str, str]) -> tuple[float, float, float, float]:
    rule, table = job
    return _replay({"oracle (stops at the best)": oracle, **RULES}[rule], TABLES[table][1])


def oracle(curve: Curve) -> int:
    return min(range(len(curve)), key=lambda index: curve[index].valid_loss) + 1


TABLES: dict[str, tuple[str, list[Curve]]] = {}
"""The family and the runs of each table."""


def tables(folder: Path) -> None:
    TABLES.update({table.name: (table.family, published(table)) for table in curves.load(folder)})
    if not TABLES:
        raise SystemExit(f"no tables in {folder}")
    families = sorted({family for family, _ in TABLES.values()})
    print(f"\npublished curves: {sum(len(runs) for _, runs in TABLES.values())} runs of {len(TABLES)} tables")
    print("mean over families of the mean over their tables; saved: evaluations not run; lost: best validation value")
    print("given up, in % of (median run - best run); harmed: runs that lose over 1 % of that")
    heads = "".join(f"{family:>15}" for family in families)
    print(f"{'rule':<30} {'saved':>7} {'lost':>7} {'harmed':>7} {'saved of overfit runs':>22}   saved/lost{heads}")
    names = ["oracle (stops at the best)", *RULES]
    jobs = [(rule, table) for rule in names for table in TABLES]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        answers = dict(zip(jobs, pool.map(_job, jobs, chunksize=1), strict=True))
    columns = ("saved", "lost", "harmed", "saved_of_overfit_runs")
    kept: dict[str, dict[str, Any]] = {}
    for name in names:
        by_family = {
            family: np.mean([answers[name, table] for table in TABLES if TABLES[table][0] == family], axis=0)
            for family in families
        }
        mean = np.mean(list(by_family.values()), axis=0)
        kept[name] = dict(zip(columns, mean.tolist(), strict=True))
        kept[name]["families"] = {
            family: dict(zip(columns, row.tolist(), strict=True)) for family, row in by_family.items()
        }
        rows = "".join(f"{f'{row[0]:.0%}/{row[1]:.1%}':>15}" for row in by_family.values())
        print(f"{name:<30} {mean[0]:>7.1%} {mean[1]:>7.1%} {mean[2]:>7.1%} {mean[3]:>22.1%}             {rows}")
    record.keep("verdict", "optuna", tables={name: len(runs) for name, (_, runs) in TABLES.items()}, rules=kept)


def _replay(rule: Rule, curves: list[Curve]) -> tuple[float, float, float, float]:
    bests = sorted(min(point.valid_loss for point in curve) for curve in curves)
    spread = (bests[len(bests) // 2] - bests[0]) or 1.0
    saved, lost, overfit_saved, harmed = [], [], [], 0
    for curve in curves:
        stopped = rule(curve)
        best = min(point.valid_loss for point in curve)
        kept = min(point.valid_loss for point in curve[:stopped])
        saved.append(1 - stopped / len(curve))
        lost.append(min((kept - best) / spread, 1.0))
        harmed += lost[-1] > 0.01
        if curve[-1].valid_loss > 1.02 * best:
            overfit_saved.append(saved[-1])
    return statistics.mean(saved), statistics.mean(lost), harmed / len(curves), statistics.mean(overfit_saved or [0.0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder with published curves")
    parser.add_argument("--seeds", type=int, default=200, help="curves per family (default 200)")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="All-NaN slice", module="optuna")
    families(options.seeds)
    if options.tables:
        tables(options.tables)


if __name__ == "__main__":
    main()
