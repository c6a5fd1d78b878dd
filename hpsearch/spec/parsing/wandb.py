"""Pasted W&B sweeps: their two top-level words in our spelling, the others refused with advice."""

from __future__ import annotations

from typing import Any

from hpsearch.errors import Problem
from hpsearch.spec.parsing.yaml_file import StudyDocument

_METHODS = {"bayes": "tpe", "random": "random", "grid": "grid"}
_HELP = {
    "metric": "hpsearch always minimises validation loss and ranks by the test metric; leave it out",
    "early_terminate": "pruning is set under 'prune'",
    "program": "hpsearch trains the model itself; say what under 'task', 'data' and 'model'",
    "command": "hpsearch trains the model itself; say what under 'task', 'data' and 'model'",
    "run_cap": "the number of trials is set under 'budget.trials'",
}

WANDB_KEYS = ("parameters", "method", *_HELP)


def from_wandb(content: dict[str, Any], problems: list[Problem], document: StudyDocument) -> dict[str, Any]:
    """The two top-level words of a pasted W&B sweep in our spelling; the others are refused with advice."""
    for key, advice in _HELP.items():
        if key in content:
            del content[key]
            problems.append(Problem(path=(key,), message=f"a W&B sweep key: {advice}", at_key=True))
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
