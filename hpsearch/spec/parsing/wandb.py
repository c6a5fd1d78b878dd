"""Pasted W&B sweeps: their two top-level words in our spelling, the others refused with advice."""

from __future__ import annotations

import re
from typing import Any

from hpsearch.errors import Problem
from hpsearch.spec.parsing.yaml_file import StudyDocument

_METHODS = {"bayes": "tpe", "random": "random", "grid": "grid"}
_HELP = {
    "early_terminate": "pruning is set under 'prune'",
    "program": "hpsearch trains the model itself; say what under 'task', 'data' and 'model'",
    "command": "hpsearch trains the model itself; say what under 'task', 'data' and 'model'",
    "run_cap": "the number of trials is set under 'budget.trials'",
}

_GOALS = ("minimize", "maximize")
WANDB_KEYS = ("parameters", "method", *_HELP)


def from_wandb(content: dict[str, Any], problems: list[Problem], document: StudyDocument) -> dict[str, Any]:
    """The two top-level words of a pasted W&B sweep in our spelling; the others are refused with advice."""
    for key, advice in _HELP.items():
        if key in content:
            del content[key]
            problems.append(Problem(path=(key,), message=f"a W&B sweep key: {advice}", at_key=True))
    if isinstance(content.get("metric"), dict):
        content["metric"] = _metric(content["metric"], problems)
    for theirs, ours in (("parameters", "search"), ("method", "sampler")):
        if theirs not in content:
            continue
        if ours in content:
            problems.append(Problem(path=(theirs,), message=f"'{ours}' is given as well; keep one", at_key=True))
            del content[theirs]
            continue
        value = content.pop(theirs)
        if theirs == "method":
            if value not in _METHODS:
                problems.append(Problem(path=(theirs,), message=f"expected {', '.join(_METHODS)}, got {value!r}"))
                continue
            value = _METHODS[value]
        content[ours] = document.content[ours] = value
        for marks in (document.key_marks, document.value_marks):
            for path in [path for path in marks if path[:1] == (theirs,)]:
                marks[(ours, *path[1:])] = marks[path]
    return content


def _metric(given: dict[str, Any], problems: list[Problem]) -> Any:
    """The name of a metric, of which more is better or less, as they say it; None of a loss, which is searched for
    anyway."""
    from hpsearch.metrics.statistics import METRICS  # numpy, which few study files need

    name, goal = given.get("name"), given.get("goal")
    for key in given:
        if key not in ("name", "goal"):
            problems.append(Problem(path=("metric", key), message="expected name and goal", at_key=True))
    if not isinstance(name, str):
        problems.append(Problem(path=("metric",), message="expected the name of a metric"))
        return None
    if goal not in (None, *_GOALS):
        problems.append(Problem(path=("metric", "goal"), message=f"expected {' or '.join(_GOALS)}, got {goal!r}"))
        return None
    # They name metrics by where they are from: eval/loss, val-loss, test.rouge_l.
    own = re.sub(r"^(eval|evaluation|val|valid|validation|test|train)[/._-]", "", name)
    known = METRICS.get(own)
    wanted = "maximize" if known is not None and known.higher_is_better else "minimize"
    if (own == "loss" or known is not None) and goal not in (None, wanted):
        problems.append(Problem(path=("metric", "goal"), message=f"expected {wanted} of {name}, got {goal}"))
    return None if own == "loss" else own
