"""Whether a changed study file may continue the study of its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpsearch.errors import (
    UsageError,
)
from hpsearch.files.storage import locate
from hpsearch.spec.redaction import hide_secrets
from hpsearch.spec.settings import DEFAULT_SHARE
from hpsearch.spec.space import narrowed
from hpsearch.spec.study import DEFAULT_STORE, StudySpec, recorded_space, recorded_study
from hpsearch.store.rows import StudyRow
from hpsearch.store.store import Store, opened_store


def existing_trials(spec: StudySpec, *, extend: bool = False, moves: bool = False) -> dict[str, int] | None:
    """Trials by state of the study that a launch would resume; None when it is new. Refuses a changed study."""
    if Store.preflight(spec.store) != "current":
        _refuse_other_study(spec)
        return None
    with opened_store(spec.store) as store:
        row = store.find_study(spec.name)
        if row is None:
            _refuse_other_study(spec)
            return None
        refuse_difference(row, spec, extend=extend)
        if not moves:
            _refuse_other_folder(store, row, spec)
        return {counted.state: counted.trials for counted in store.counts(row.id) if not counted.is_repeat}


def with_its_defaults(spec: StudySpec) -> StudySpec:
    """`as_begun`, when the store has the study, also in tables of an older hpsearch."""
    if Store.preflight(spec.store) != "current":
        return spec
    with opened_store(spec.store) as store:
        row = store.find_study(spec.name)
    return spec if row is None else as_begun(spec, row)


def _refuse_other_study(spec: StudySpec) -> None:
    if Store.holds_other_study(spec.store, spec.name):
        raise UsageError(
            f"the database {hide_secrets(spec.store)} holds a study '{spec.name}' of Optuna's that hpsearch has not "
            "made; give this one another name with --name, or another store"
        )


def _refuse_other_folder(store: Store, row: StudyRow, spec: StudySpec) -> None:
    """Raise UsageError when the study's files lie elsewhere: it may be somebody else's, under the same name."""
    ours, theirs = str(locate(spec.folder)), row.placement.get("folder")
    lease = store.lease(row.id)
    if theirs in (None, ours) or lease is None:
        return
    raise UsageError(
        f"study '{spec.name}' is in the store already: {lease.holder} launched it at "
        f"{lease.acquired_at:%Y-%m-%d %H:%M} UTC, and its files lie in {theirs}, not in {ours}.\n"
        f"Give the new study a name of its own with --name. To resume that one, give --folder {theirs} where this "
        f"machine reaches it, or --folder {spec.folder} to train its unfinished trials from the start"
    )


def refuse_difference(row: StudyRow, spec: StudySpec, *, extend: bool) -> None:
    """Raise UsageError when the study of the store says something else, and may not be (or was not) extended."""
    old, new = {**_completed(row), "budget": {"trials": row.budget_trials}}, spec.record()
    new["budget"] = {"trials": spec.budget.trials}
    differences = list(_differences(old, new))
    if not differences:
        return
    changed = "\n".join(f"  {path}: {_shown(was)} -> {_shown(now)}" for path, was, now in differences)
    problems = [
        f"  {path} is not part of the space or the budget"
        for path, _, _ in differences
        if not path.startswith(("search.", "budget."))
    ]
    if spec.budget.trials < row.budget_trials:
        problems.append(f"  budget.trials: {spec.budget.trials} is less than the {row.budget_trials} it has")
    problems += [f"  {problem}" for problem in narrowed(recorded_space(row.spec), spec.space)]
    if extend and not problems:
        return
    heading = f"study '{spec.name}' is in the store already, from a file that says something else:\n{changed}\n"
    if not problems:
        raise UsageError(f"{heading}This only widens it: give --extend to accept that")
    if extend:
        raise UsageError(f"{heading}--extend takes a larger budget or a wider space only:\n" + "\n".join(problems))
    raise UsageError(
        f"{heading}Undo the change to resume it, give the new study a name of its own with --name, or archive the "
        "old one with --restart"
    )


def _completed(row: StudyRow) -> dict[str, Any]:
    """The record of a study with today's defaults for settings that there were none of when it was begun."""
    try:
        spec = recorded_study(row.spec, row.placement, DEFAULT_STORE, trials=row.budget_trials)
    except (ValueError, UsageError):  # what it says is not allowed any more, or its task is not here
        return dict(row.spec)
    named = {key: row.spec["data"][key] for key in ("files", "mix") if key in row.spec["data"]}
    return {**spec.record(), "data": {**spec.record()["data"], **named}}


def as_begun(spec: StudySpec, row: StudyRow) -> StudySpec:
    """The study with the defaults that it was begun with, where its file says nothing: today's may be others."""
    update: dict[str, Any] = {}
    for section, defaults in spec.defaults.items():
        recorded = row.spec.get(section, {})
        values = {name: recorded[name] for name in defaults if recorded.get(name) is not None}
        update[section] = getattr(spec, section).model_copy(update=values)
    training = update.get("training", spec.training)
    if "evaluation_share" not in row.spec.get("training", {}) and training.evaluation_share == DEFAULT_SHARE:
        update["training"] = training.model_copy(update={"evaluation_share": 1.0})
    entries = row.spec.get("tokenizer", {}).get("vocab_size")
    if spec.tokenizer.vocab_size == "auto" and isinstance(entries, int):
        update["tokenizer"] = spec.tokenizer.model_copy(update={"vocab_size": entries})
    return spec.model_copy(update=update)


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def _shown(value: Any) -> str:
    return "(absent)" if value is None else str(value)
