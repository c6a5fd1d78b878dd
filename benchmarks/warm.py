"""Warm starts on learning curves: what an earlier study of another task is worth to a new one.

    python benchmarks/warm.py --tables FOLDER [--seeds N] [--only WORD ...]

For each table the next one of its family is searched first, with the whole budget and with hpsearch's defaults. What
that search has found goes into the search of the table itself in the ways that a study file has: `transfer_from:` (its
best settings are tried first), `enqueue:` (the best alone), and `prior:` (the best as a belief). `prior:` at the worst
settings that the earlier search has tried shows what a wrong belief costs. Settings and values that the table does not
have are left out. The tables, the budget and the regret are those of `benchmarks/search.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import curves
import numpy as np
import record
import search
from curves import Setting, Table

from hpsearch.driver.starts import TRANSFERRED

WAYS = ("cold", "transfer_from", "enqueue", "prior", "prior, wrong")
SHOWN = (0.1, 0.25, 0.5, 1.0)


def translated(params: dict[str, float], earlier: Table, table: Table) -> dict[str, float]:
    """Settings of one table as far as another one has them."""
    there = {setting.name: setting for setting in earlier.settings}
    found = {}
    for setting in table.settings:
        if setting.name in params and setting.name in there:
            value = _value(there[setting.name], params[setting.name])
            if setting.is_choice and value in setting.values:
                found[setting.name] = setting.values.index(value)
            elif not setting.is_choice and setting.values[0] <= value <= setting.values[-1]:
                found[setting.name] = value
    return found


def _value(setting: Setting, param: float) -> float:
    return setting.values[int(param)] if setting.is_choice else param


def run(job: tuple[str, str, int]) -> dict[str, list[float]]:
    """The regrets of each way on a table, after an earlier search of another one."""
    name, before, seed = job
    table, earlier = search.TABLES[name], search.TABLES[before]
    first = search.Ours(earlier, seed)
    search.simulate(earlier, first, 1)
    ranked = [there for params in first.ranked() if (there := translated(params, earlier, table))]
    starts: dict[str, Sequence[dict[str, float]]] = {"transfer_from": ranked[:TRANSFERRED], "enqueue": ranked[:1]}
    priors = {"prior": ranked[:1], "prior, wrong": ranked[-1:]}
    return {
        way: search.simulate(
            table,
            search.Ours(table, seed + 1, starts=starts.get(way, ()), priors=next(iter(priors.get(way, ())), None)),
            1,
        )
        for way in WAYS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder with learning curves")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="tables whose names hold one of these")
    options = parser.parse_args()
    found = [table for table in curves.load(options.tables, options.only) if table.is_for_search]
    search.TABLES.update({table.name: table for table in found})
    pairs = []
    for family in dict.fromkeys(table.family for table in found):
        names = [table.name for table in found if table.family == family]
        pairs += list(zip(names, names[1:] + names[:1], strict=True)) if len(names) > 1 else []
    if not pairs:
        raise SystemExit(f"no two tables of one family in {options.tables}; see benchmarks/curves.py")
    jobs = [(name, before, seed) for name, before in pairs for seed in range(options.seeds)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), initializer=search.quiet) as pool:
        answers = pool.map(run, jobs, chunksize=1)
    print(f"regret on {len(pairs)} tables, each after the next of its family; {options.seeds} seeds, one trial at once")
    print(f"{'':<16}{'10 %':>7}{'25 %':>7}{'50 %':>7}{'100 %':>7}   epochs to the cold start's end (90 %)")
    # Of shape (tables, seeds, parts of the budget).
    regrets = {
        way: np.array([answer[way] for answer in answers]).reshape(len(pairs), options.seeds, -1) for way in WAYS
    }
    rows = {}
    for way, regret in regrets.items():
        mean = regret.mean(axis=(0, 1))
        shown = {f"{part:g}": float(mean[np.argmin(abs(search.GRID - part))]) for part in SHOWN}
        share, interval = search.ratio(regret, regrets["cold"]), search.interval(regret, regrets["cold"])
        rows[way] = {"regret": shown, "epochs_to_cold": share, "epochs_to_cold_90": list(interval)}
        values = "".join(f"{value:>7.3f}" for value in shown.values())
        print(f"{way:<16}{values}   {share:.2f} ({interval[0]:.2f}-{interval[1]:.2f})")
    record.keep("warm", "optuna", seeds=options.seeds, pairs=pairs, ways=rows)


if __name__ == "__main__":
    main()
