"""Search quality on published learning curves: normalised regret against epochs spent, for hpsearch and its peers.

    python benchmarks/search.py --tables FOLDER [--seeds N] [--workers N ...] [--only WORD ...] [--methods NAME ...]

Each method searches each table as if it trained: a suggestion is served by the nearest run not yet used, and every
epoch counts, whoever asked for it. The budget is 20 full runs' worth of epochs. Regret is 0 at the best run of a table
and 1 at its median run. A trial that is promoted goes on from its checkpoint.

Of each method the table says its regret after 10, 25, 50 and 100 % of the budget, the mean over it (area), and how many
epochs it needs to come to the regret that Optuna's default ends at, as a part of what that one needs: the geometric
mean over tables, where a method that never comes there counts as twice the budget.

hpsearch's scheme was first chosen on the tables named in TUNED_ON; the others are reported apart, but are no blind
test: its last details were settled with a look at all of them. What the tables are and where they are from:
`benchmarks/curves.py`. None is part of this project.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import logging
import math
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import curves
import numpy as np
import optuna
import record
from curves import Table
from numpy.typing import NDArray

from hpsearch.pruning import rungs
from hpsearch.pruning.overfitting import judge
from hpsearch.records import TrialState
from hpsearch.search.study import Search
from hpsearch.spec.sections import OverfitRule
from hpsearch.spec.space import Range, Space
from hpsearch.spec.study import StudySpec

BUDGET = 20
"""Full runs."""
BASE = "Optuna TPE + Median (its default)"
TUNED_ON = (
    "nmtlc_fr-en", "nmtlc_material-sw-en", "nmtlc_material-so-en", "nmtlc_ted-ru-en",
    "taskset_imdb_patch32_LSTM128_bs128", "taskset_imdb_patch32_VRNN64_relu_avg_bs128",
    "taskset_imdb_patch32_GRU128_bs128", "taskset_imdb_patch32_GRU64_avg_bs128",
    "lcbench_167168", "lcbench_189906", "lcbench_126026", "lcbench_168868",
)  # fmt: skip
GRID = np.linspace(0.02, 1.0, 50)
WORST_REGRET = 2.0


class Method(Protocol):
    """A searcher and scheduler. Trials are numbers; a value is a validation loss."""

    def next(self) -> tuple[int, dict[str, float] | None]:
        """A trial to run: a new one with its settings, or one that goes on."""

    def report(self, trial: int, epoch: int, value: float, *, ends: bool) -> bool:
        """Hear of an epoch; whether the trial goes on now."""

    def overfits(self, table: Table, run: int, epoch: int) -> bool:
        """Whether the method ends this run here because of its own curve."""


class Peer:
    def overfits(self, table: Table, run: int, epoch: int) -> bool:
        return False


def coded(table: Table, config: dict[str, float]) -> NDArray[np.float64]:
    """Settings as a point of the unit cube; of a choice the settings hold the place among its values."""
    return np.array(
        [
            config[setting.name] / max(1, len(setting.values) - 1)
            if setting.is_choice
            else setting.scaled(config[setting.name])
            for setting in table.settings
        ]
    )


# hpsearch


class Ours:
    """The default of a study: `Search` as a launch uses it, without a store."""

    def __init__(
        self,
        table: Table,
        seed: int,
        *,
        starts: Sequence[dict[str, float]] = (),
        priors: dict[str, float] | None = None,
    ) -> None:
        """`starts` are settings to try first, `priors` beliefs, both as the study's own parameters."""
        priors = priors or {}
        dimensions = {
            setting.name: Range(
                low=0, high=len(setting.values) - 1, integer=True, step=1, prior=priors.get(setting.name)
            )
            if setting.is_choice
            else Range(
                low=setting.values[0], high=setting.values[-1], log=setting.is_log, prior=priors.get(setting.name)
            )
            for setting in table.settings
        }
        spec = StudySpec.model_validate(
            {"name": "table", "task": "causal_lm", "data": {"corpus": "python_docs"}, "seed": seed}
        )
        vars(spec)["space"] = Space(fixed={}, dimensions=dict(dimensions))  # of settings that hpsearch does not have
        self._search = Search(spec, None, starts=[start for start in (*starts, priors) if start])
        self._keep = spec.limits.keep_paused
        places = rungs.places(spec.prune.unpromising.reduction_factor, warmup_fraction=0.0)
        self._rung_at = {max(1, math.ceil(part * table.epochs)): rung for rung, part in enumerate(places)}
        self._best: dict[int, float] = {}
        self._paused: set[int] = set()

    def next(self) -> tuple[int, dict[str, float] | None]:
        promoted = self._search.promote()
        if promoted is not None:
            self._paused.discard(promoted)
            return promoted, None
        suggestion = self._search.ask()
        return suggestion.number, suggestion.params

    def report(self, trial: int, epoch: int, value: float, *, ends: bool) -> bool:
        best = self._best[trial] = min(value, self._best.get(trial, math.inf))
        if ends:
            self._search.tell(trial, TrialState.COMPLETED, value=best, notes={})
            return False
        rung = self._rung_at.get(epoch)
        if rung is None or self._search.at_rung(trial, rung, best):
            return True
        self._search.pause(trial)
        self._paused.add(trial)
        if len(self._paused) > self._keep:
            last = self._search.worst()
            self._paused.discard(last)
            self._search.tell(last, TrialState.UNPROMISING, value=self._best[last], notes={})
        return False

    def overfits(self, table: Table, run: int, epoch: int) -> bool:
        return epoch >= stopped_after(table.name, run)

    def ranked(self) -> list[dict[str, float]]:
        """The settings that were tried, best first."""
        return [self._search.params(trial) for trial in sorted(self._best, key=lambda trial: self._best[trial])]


@dataclass(frozen=True)
class _Point:
    train_loss: float
    valid_loss: float


@cache
def stopped_after(name: str, run: int) -> float:
    """Epochs after which our verdict ends a run; a table without training losses is read as if they fell."""
    table = TABLES[name]
    valid = table.valid[run]
    train = np.arange(len(valid), 0.0, -1.0) if table.train is None else table.train[run]
    points = [_Point(float(one), float(other)) for one, other in zip(train, valid, strict=True)]
    rule = OverfitRule()

    def stops(seen: int) -> bool:
        left = table.decay_to_come(run, seen)
        return judge(points[:seen], table.epochs, rule, decay_to_come=left).stops

    return next((seen for seen in range(1, len(points) + 1) if stops(seen)), math.inf)


# Peers, each as its documentation has it


def _distributions(table: Table) -> dict[str, optuna.distributions.BaseDistribution]:
    return {
        setting.name: optuna.distributions.IntDistribution(0, len(setting.values) - 1)
        if setting.is_choice
        else optuna.distributions.FloatDistribution(setting.values[0], setting.values[-1], log=setting.is_log)
        for setting in table.settings
    }


class Optuna(Peer):
    def __init__(self, table: Table, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner) -> None:
        self._space = _distributions(table)
        self._study = optuna.create_study(sampler=sampler, pruner=pruner)
        self._live: dict[int, optuna.Trial] = {}

    def next(self) -> tuple[int, dict[str, float] | None]:
        trial = self._study.ask(self._space)
        self._live[trial.number] = trial
        return trial.number, trial.params

    def report(self, trial: int, epoch: int, value: float, *, ends: bool) -> bool:
        live = self._live[trial]
        live.report(value, epoch)
        if ends:
            self._study.tell(live, value)
        elif live.should_prune():
            self._study.tell(live, state=optuna.trial.TrialState.PRUNED)
        else:
            return True
        return False


class RayTune(Peer):
    """Ray Tune's ASHA with its defaults, and random settings or OptunaSearch with its defaults."""

    def __init__(self, table: Table, seed: int, *, by_optuna: bool) -> None:
        from ray.tune.schedulers import AsyncHyperBandScheduler
        from ray.tune.search.optuna import OptunaSearch

        self._scheduler = AsyncHyperBandScheduler(
            time_attr="epoch", metric="loss", mode="min", max_t=table.epochs, grace_period=1
        )
        sampler = None if by_optuna else optuna.samplers.RandomSampler(seed=seed)
        self._search = OptunaSearch(
            space=_distributions(table), metric="loss", mode="min", sampler=sampler, seed=seed if by_optuna else None
        )
        self._trials: list[Any] = []

    def next(self) -> tuple[int, dict[str, float] | None]:
        trial = SimpleNamespace(trial_id=str(len(self._trials)))
        config = self._search.suggest(trial.trial_id)
        self._scheduler.on_trial_add(None, trial)
        self._trials.append(trial)
        return len(self._trials) - 1, config

    def report(self, trial: int, epoch: int, value: float, *, ends: bool) -> bool:
        there = self._trials[trial]
        result = {"epoch": epoch, "training_iteration": epoch, "loss": value}
        self._search.on_trial_result(there.trial_id, result)
        if not ends and self._scheduler.on_trial_result(None, there, result) == "CONTINUE":
            return True
        self._scheduler.on_trial_complete(None, there, result)
        self._search.on_trial_complete(there.trial_id, result)
        return False


class SyneTune(Peer):
    """Syne Tune's ASHA with its defaults."""

    def __init__(self, table: Table, seed: int) -> None:
        from syne_tune.backend.trial_status import Trial
        from syne_tune.config_space import loguniform, randint, uniform
        from syne_tune.optimizer.schedulers.asha import AsynchronousSuccessiveHalving

        space = {
            setting.name: randint(0, len(setting.values) - 1)
            if setting.is_choice
            else (loguniform if setting.is_log else uniform)(setting.values[0], setting.values[-1])
            for setting in table.settings
        }
        self._scheduler = AsynchronousSuccessiveHalving(
            space, metric="loss", time_attr="epoch", max_t=table.epochs, random_seed=seed
        )
        self._make = Trial
        self._trials: list[Any] = []

    def next(self) -> tuple[int, dict[str, float] | None]:
        config = self._scheduler.suggest().config
        trial = self._make(trial_id=len(self._trials), config=config, creation_time=None)
        self._scheduler.on_trial_add(trial)
        self._trials.append(trial)
        return trial.trial_id, config

    def report(self, trial: int, epoch: int, value: float, *, ends: bool) -> bool:
        there, result = self._trials[trial], {"epoch": epoch, "loss": value}
        if ends:
            self._scheduler.on_trial_complete(there, result)
            return False
        return bool(self._scheduler.on_trial_result(there, result) == "CONTINUE")


class Budgeted(Peer, ABC):
    """A peer that is asked for settings and for how many epochs, and told the value at their end."""

    def __init__(self) -> None:
        self._asked: list[Any] = []
        """Of each trial what was asked for last."""
        self._until: list[int] = []
        self._ended: dict[int, float] = {}
        """Trials whose runs ended by themselves, with their last value: they come to no more in more epochs."""

    def next(self) -> tuple[int, dict[str, float] | None]:
        asked, before, until, config = self._ask()
        while before is not None:
            trial = next(number for number, one in enumerate(self._asked) if one is before)
            self._asked[trial], self._until[trial] = asked, until
            if trial not in self._ended:
                return trial, None
            self._tell(asked, self._ended[trial])
            asked, before, until, config = self._ask()
        self._asked.append(asked)
        self._until.append(until)
        return len(self._asked) - 1, config

    def report(self, trial: int, epoch: int, value: float, *, ends: bool) -> bool:
        if not ends and epoch < self._until[trial]:
            return True
        if ends:
            self._ended[trial] = value
        self._tell(self._asked[trial], value)
        return False

    @abstractmethod
    def _ask(self) -> tuple[Any, Any, int, dict[str, float]]:
        """What is asked for, what of before it goes on from (or None), up to which epoch, and the settings."""

    @abstractmethod
    def _tell(self, asked: Any, value: float) -> None:
        """The value at the end of what was asked for."""


class NePS(Budgeted):
    """NePS with what it chooses for a space with epochs and without priors: Hyperband, whose runs go on."""

    def __init__(self, table: Table, seed: int) -> None:
        import neps
        import torch

        super().__init__()
        torch.manual_seed(seed)
        random.seed(seed)
        space = neps.SearchSpace(
            {
                "epoch": neps.HPOInteger(1, table.epochs, is_fidelity=True),
                **{
                    setting.name: neps.HPOInteger(0, len(setting.values) - 1)
                    if setting.is_choice
                    else neps.HPOFloat(setting.values[0], setting.values[-1], log=setting.is_log)
                    for setting in table.settings
                },
            }
        )
        chosen = neps.algorithms.determine_optimizer_automatically(space)
        self._neps = neps.AskAndTell(getattr(neps.algorithms, chosen)(space))
        self._by_id: dict[str, Any] = {}

    def _ask(self) -> tuple[Any, Any, int, dict[str, float]]:
        asked = self._neps.ask()
        config = dict(asked.config)
        self._by_id[asked.metadata.id] = asked
        until = int(config.pop("epoch"))
        return asked, self._by_id.get(asked.metadata.previous_trial_id), until, config

    def _tell(self, asked: Any, value: float) -> None:
        self._neps.tell(asked, value)


class Smac(Budgeted):
    """SMAC's MultiFidelityFacade; its acquisition function is maximised over 200 points, where 5,000 take minutes.

    It proposes no settings twice: when a space of choices has none left, random ones run in full.
    """

    def __init__(self, table: Table, seed: int) -> None:
        import ConfigSpace
        import smac

        super().__init__()
        logging.getLogger("smac").setLevel(logging.ERROR)
        space = ConfigSpace.ConfigurationSpace(seed=seed)
        for setting in table.settings:
            space.add(
                ConfigSpace.Integer(setting.name, (0, len(setting.values) - 1))
                if setting.is_choice
                else ConfigSpace.Float(setting.name, (setting.values[0], setting.values[-1]), log=setting.is_log)
            )
        scenario = smac.Scenario(
            space, deterministic=True, min_budget=1, max_budget=table.epochs, n_trials=100_000, seed=seed,
            output_directory=Path(tempfile.mkdtemp(prefix="smac-")),
        )  # fmt: skip
        facade = smac.MultiFidelityFacade
        self._smac = facade(
            scenario, lambda config, seed=0, budget=0: 0.0, overwrite=True, logging_level=False,
            acquisition_maximizer=facade.get_acquisition_maximizer(scenario, challengers=200),
        )  # fmt: skip
        self._by_config: dict[Any, Any] = {}
        self._space, self._epochs = space, table.epochs

    def _ask(self) -> tuple[Any, Any, int, dict[str, float]]:
        from smac.main.exceptions import ConfigurationSpaceExhaustedException

        try:
            asked = self._smac.ask()
        except (ConfigurationSpaceExhaustedException, StopIteration):
            return None, None, self._epochs, dict(self._space.sample_configuration())
        before = self._by_config.get(asked.config)
        if before is not None and before.budget >= asked.budget:
            before = None
        self._by_config[asked.config] = asked
        return asked, before, max(1, round(asked.budget)), dict(asked.config)

    def _tell(self, asked: Any, value: float) -> None:
        from smac.runhistory import TrialValue

        if asked is not None:
            self._smac.tell(asked, TrialValue(cost=value), save=False)


def _tpe(seed: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=seed)


METHODS: dict[str, Callable[[Table, int], Method]] = {
    "hpsearch (default)": Ours,
    BASE: lambda table, seed: Optuna(table, _tpe(seed), optuna.pruners.MedianPruner()),
    "Optuna TPE + Hyperband": lambda table, seed: Optuna(
        table, _tpe(seed), optuna.pruners.HyperbandPruner(min_resource=1, max_resource=table.epochs)
    ),
    "Optuna TPE, no pruner": lambda table, seed: Optuna(table, _tpe(seed), optuna.pruners.NopPruner()),
    "Optuna CMA-ES + Median": lambda table, seed: Optuna(
        table,
        optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        optuna.pruners.MedianPruner(),
    ),
    "Ray Tune ASHA, random": lambda table, seed: RayTune(table, seed, by_optuna=False),
    "Ray Tune ASHA + OptunaSearch": lambda table, seed: RayTune(table, seed, by_optuna=True),
    "Syne Tune ASHA": SyneTune,
    "NePS (its choice: Hyperband)": NePS,
    "SMAC MultiFidelity": Smac,
    "random": lambda table, seed: Optuna(table, optuna.samplers.RandomSampler(seed=seed), optuna.pruners.NopPruner()),
}
TABLES: dict[str, Table] = {}


def simulate(table: Table, method: Method, workers: int) -> list[float]:
    """Regret after each part of the budget in GRID."""
    budget = BUDGET * table.full_run
    is_free = np.ones(len(table.valid), dtype=bool)
    runs: dict[int, int] = {}
    done: dict[int, int] = {}
    best, spent = math.inf, 0
    reached = np.full(len(GRID), WORST_REGRET)
    order = itertools.count()
    # Each worker makes an epoch at a time; the clock counts epochs.
    clock: list[tuple[int, int, int | None]] = [(0, next(order), None) for _ in range(workers)]
    while clock and spent < budget:
        now, _, trial = heapq.heappop(clock)
        if trial is not None:
            curve = table.valid[runs[trial]]
            done[trial] += 1
            spent += 1
            value = float(curve[done[trial] - 1])
            if value < best:
                best = value
                reached[budget * GRID >= spent] = min(table.regret(best), WORST_REGRET)
            ends = done[trial] >= len(curve) or method.overfits(table, runs[trial], done[trial])
            if not method.report(trial, done[trial], value, ends=ends):
                trial = None
        if trial is None:
            trial, config = method.next()
            if config is not None:
                distance = ((table.points - coded(table, config)) ** 2).sum(axis=1)
                distance[~is_free] = math.inf
                runs[trial] = int(distance.argmin())
                done[trial] = 0
                is_free[runs[trial]] = False
                if not is_free.any():
                    is_free[:] = True
        heapq.heappush(clock, (now + 1, next(order), trial))
    return [float(value) for value in reached]


def run(job: tuple[str, str, int, int]) -> tuple[list[float], float] | str:
    """A method's regrets and its own CPU-seconds, or why it failed."""
    name, table, seed, workers = job
    np.random.seed(seed)  # Ray Tune and Syne Tune draw brackets from it
    began = time.process_time()
    try:
        return simulate(TABLES[table], METHODS[name](TABLES[table], seed), workers), time.process_time() - began
    except Exception as error:  # a peer that fails is shown as failed
        return f"{type(error).__name__}: {error}"


def _reach(curve: NDArray[np.float64], value: float) -> float:
    """The part of the budget after which a mean curve is as low as this; 2 when it never is."""
    there = np.flatnonzero(curve <= value + 1e-12)
    return float(GRID[there[0]]) if len(there) else 2.0


def ratio(found: NDArray[np.float64], base: NDArray[np.float64]) -> float:
    """Epochs to the base's final regret as a part of the base's own: geometric mean over tables (seeds averaged first).

    Both are of shape (tables, seeds, parts of the budget).
    """
    parts = [
        math.log(_reach(one, other[-1]) / _reach(other, other[-1]))
        for one, other in zip(found.mean(axis=1), base.mean(axis=1), strict=True)
    ]
    return math.exp(float(np.mean(parts)))


def interval(found: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float]:
    """90 % of what the ratio is when seeds are drawn again."""
    draw = np.random.default_rng(0)
    seeds = found.shape[1]
    drawn = [ratio(found[:, chosen], base[:, chosen]) for chosen in draw.integers(0, seeds, (200, seeds))]
    low, high = np.percentile(drawn, [5, 95])
    return float(low), float(high)


def report(
    regrets: dict[str, dict[str, NDArray[np.float64]]], tables: Sequence[str], title: str
) -> dict[str, dict[str, Any]]:
    """Print the methods on some tables; returns the numbers."""
    print(f"\n{title}: {len(tables)} tables")
    print(f"{'':<36}{'10 %':>7}{'25 %':>7}{'50 %':>7}{'100 %':>7}{'area':>7}   epochs to the default's end (90 %)")
    base = np.stack([regrets[BASE][table] for table in tables])
    rows: dict[str, dict[str, Any]] = {}
    for name, by_table in regrets.items():
        found = np.stack([by_table[table] for table in tables])
        mean = found.mean(axis=(0, 1))
        share, (low, high) = ratio(found, base), interval(found, base)
        error = float(found[..., -1].mean(axis=0).std(ddof=1) / math.sqrt(found.shape[1])) if found.shape[1] > 1 else 0
        rows[name] = {
            "regret": {f"{part:g}": float(mean[np.argmin(abs(GRID - part))]) for part in (0.1, 0.25, 0.5, 1.0)},
            "standard_error_at_end": error,
            "area": float(mean.mean()),
            "epochs_to_default": share,
            "epochs_to_default_90": [low, high],
        }
        values = "".join(f"{value:>7.3f}" for value in (*rows[name]["regret"].values(), rows[name]["area"]))
        print(f"{name:<36}{values}   {share:.2f} ({low:.2f}-{high:.2f})")
    return rows


def against_best_peers(
    regrets: dict[str, dict[str, NDArray[np.float64]]], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Of each family the peer that ends lowest, and our epochs to its end."""
    ours = regrets["hpsearch (default)"]
    print("\nagainst the best peer of each family, by its regret at the end")
    rows: dict[str, dict[str, Any]] = {}
    for family in sorted({TABLES[table].family for table in names}):
        tables = [table for table in names if TABLES[table].family == family]
        stacked = {name: np.stack([found[table] for table in tables]) for name, found in regrets.items()}
        best = min(
            (name for name in stacked if name != "hpsearch (default)"), key=lambda name: stacked[name][..., -1].mean()
        )
        found = np.stack([ours[table] for table in tables])
        share = ratio(found, stacked[best])
        low, high = interval(found, stacked[best])
        ends = float(found[..., -1].mean()), float(stacked[best][..., -1].mean())
        print(f"{family:<10} {best:<36} epochs {share:.2f} ({low:.2f}-{high:.2f})   end {ends[0]:.3f} v {ends[1]:.3f}")
        rows[family] = {"peer": best, "epochs": share, "epochs_90": [low, high], "end": ends[0], "peer_end": ends[1]}
    if "random" in regrets:
        behind = [table for table in names if ours[table][:, -1].mean() > regrets["random"][table][:, -1].mean()]
        print(f"ends above random on: {', '.join(behind) or 'no table'}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder with published curves")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4], help="trials at once (default 1 and 4)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="tables whose names hold one of these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    options = parser.parse_args()
    TABLES.update({table.name: table for table in curves.load(options.tables, options.only) if table.is_for_search})
    if not TABLES:
        raise SystemExit(f"no tables in {options.tables}; see benchmarks/curves.py for where they are from")
    methods = list(dict.fromkeys([*options.methods, BASE]))
    results: dict[str, Any] = {}
    for workers in options.workers:
        jobs = [(name, table, seed, workers) for name in methods for table in TABLES for seed in range(options.seeds)]
        with multiprocessing.get_context("fork").Pool(os.cpu_count(), initializer=quiet) as pool:
            answers = dict(zip(jobs, pool.map(run, jobs, chunksize=2), strict=True))
        failed = {job[0]: answer for job, answer in answers.items() if isinstance(answer, str)}
        regrets = {
            name: {
                table: np.array([answers[name, table, seed, workers][0] for seed in range(options.seeds)])
                for table in TABLES
            }
            for name in methods
            if name not in failed
        }
        print(f"\n== {workers} trial{'s' * (workers > 1)} at once, {options.seeds} seeds ==")
        tuned = [table for table in TABLES if table in TUNED_ON]
        held_out = [table for table in TABLES if table not in TUNED_ON]
        found: dict[str, Any] = {}
        for title, there in (("tables that ours was tuned on", tuned), ("tables that it was not", held_out)):
            if there:
                found[title] = report(regrets, there, title)
        if "hpsearch (default)" in regrets:
            found["best peers, tuned on"] = against_best_peers(regrets, tuned) if tuned else {}
            found["best peers, not tuned on"] = against_best_peers(regrets, held_out) if held_out else {}
        found["failed"] = failed
        found["cpu_seconds_a_run"] = {
            name: float(np.mean([answer[1] for job, answer in answers.items() if job[0] == name])) for name in regrets
        }
        found["final_regret"] = {
            name: {table: float(values[:, -1].mean()) for table, values in by_table.items()}
            for name, by_table in regrets.items()
        }
        for name, why in failed.items():
            print(f"failed: {name}: {why}")
        results[f"{workers} at once"] = found
    record.keep(
        "search",
        "optuna",
        "ray",
        "syne-tune",
        "cmaes",
        "neural-pipeline-search",
        "smac",
        seeds=options.seeds,
        budget_full_runs=BUDGET,
        results=results,
    )


def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
