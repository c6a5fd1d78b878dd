"""Mistakes in a study file that only show when two of its parts are seen together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpsearch.errors import Problem
from hpsearch.spec.parsing.yaml_file import KeyPath
from hpsearch.spec.sections import SourceSpec
from hpsearch.spec.settings import FIXED_BY_PRETRAINED, FOR_PRETRAINED, Scalar
from hpsearch.spec.space import Choice, Range, Space
from hpsearch.spec.study import StudySpec


def places_of_sources(spec: StudySpec) -> list[tuple[KeyPath, SourceSpec]]:
    """The sources of a study, and the keys that they stand under in its file."""
    if not spec.data.mix:
        return [(("data",), spec.data)]
    return [(("data", "mix", index), source) for index, source in enumerate(spec.data.mix)]


def cross_checks(spec: StudySpec, content: dict[str, Any]) -> list[Problem]:
    """Mistakes that only show when two parts of the file are seen together."""
    problems = []
    space = spec.space
    task = spec.definition
    for place, source in places_of_sources(spec):
        if source.corpus is not None and source.corpus not in task.corpora:
            fitting = " or ".join(task.corpora) or "files or hub"
            message = f"{source.corpus} is no {task.name} data; expected {fitting}"
            problems.append(Problem(path=(*place, "corpus"), message=message))
    for name in ("source_language", "target_language"):
        if getattr(spec.data, name) is not None and not task.is_pair:
            message = f"only a text and its translation have languages; this study's task is {task.name}"
            problems.append(Problem(path=("data", name), message=message, at_key=True))
    if spec.data.rare_labels != "keep" and not task.has_labels:
        message = f"this study's task is {task.name}, whose examples have no labels"
        problems.append(Problem(path=("data", "rare_labels"), message=message, at_key=True))
    problems += task.problems(spec.options)
    if spec.metric is not None and spec.metric not in (ranking := task.metric_names(spec.options)):
        message = f"{spec.metric} is no test metric of {task.name} studies like this; expected {' or '.join(ranking)}"
        problems.append(Problem(path=("metric",), message=message))
    if spec.objective not in (objectives := task.objective_names(spec.options)):
        expected = " or ".join(objectives)
        message = f"{task.name} studies like this have no validation {spec.objective}; expected {expected}"
        problems.append(Problem(path=("objective",), message=message))
    if spec.backend == "inline" and spec.resources.processes > 1:
        message = "the inline backend has one process, on one GPU at most; expected backend: ray"
        problems.append(Problem(path=("resources", "gpus_per_trial"), message=message))
    problems += _pretrained_problems(spec, content)
    if not spec.tokenizer.shared and not task.is_pair:
        message = f"this study's task is {task.name}, which has one vocabulary"
        problems.append(Problem(path=("tokenizer", "shared"), message=message))
    for section in ("model", "training"):
        given = content.get(section)
        for name in given if isinstance(given, dict) else ():
            if name in space.fixed or name in space.dimensions:
                problems.append(
                    Problem(
                        path=(section, name), message=f"'{name}' stands under 'search' as well; keep one", at_key=True
                    )
                )
    for index, start in enumerate(spec.enqueue):
        problems += _wrong_start(space, start, ("enqueue", index))
    if spec.sampler.name == "grid" and (spec.enqueue or spec.transfer_from or space.priors):
        what = "enqueue" if spec.enqueue else "transfer_from" if spec.transfer_from else "search"
        message = "the grid sampler tries every setting once, in no order; expected another sampler"
        problems.append(Problem(path=(what,), message=message, at_key=True))
    if spec.sampler.name == "grid":
        for name, dimension in space.dimensions.items():
            if isinstance(dimension, Range) and dimension.size == float("inf"):
                problems.append(
                    Problem(
                        path=("search", name), message="the grid sampler needs a list of values, or a range with step"
                    )
                )
            if dimension.when:
                problems.append(Problem(path=("search", name, "when"), message="the grid sampler knows no conditions"))
    if spec.sampler.name == "cmaes":
        numeric = [name for name, dimension in space.dimensions.items() if isinstance(dimension, Range)]
        if len(numeric) < 2:
            problems.append(
                Problem(path=("sampler",), message="cmaes needs at least two ranges (choices are sampled at random)")
            )
    if spec.model.pretrained is None:
        problems += _head_problems(spec)
    return problems


def _pretrained_problems(spec: StudySpec, content: dict[str, Any]) -> list[Problem]:
    """Settings that a pretrained model brings along, or that need one."""
    model = content.get("model")
    named = [(("model", name), name) for name in (model if isinstance(model, dict) else ())]
    named += [(("search", name), name) for name in (*spec.space.fixed, *spec.space.dimensions)]
    if spec.model.pretrained is None:
        return [
            Problem(path=path, message=f"'{name}' is for a model that is fine-tuned; set model.pretrained", at_key=True)
            for path, name in named
            if name in FOR_PRETRAINED
        ]
    problems = [
        Problem(path=path, message=f"'{name}' comes with the pretrained model; leave it out", at_key=True)
        for path, name in named
        if name in FIXED_BY_PRETRAINED
    ]
    if "tokenizer" in content:
        message = "the tokenizer comes with the pretrained model; leave it out"
        problems.append(Problem(path=("tokenizer",), message=message, at_key=True))
    return problems


def _head_problems(spec: StudySpec) -> list[Problem]:
    """Widths that some number of heads does not divide, over all combinations of the space."""

    def values(name: str, fixed: Scalar | None) -> list[Any] | None:
        dimension = spec.space.dimensions.get(name)
        if isinstance(dimension, Choice):
            return list(dimension.values)
        if isinstance(dimension, Range):
            if dimension.size > 1000:
                return None
            step = int(dimension.step or 1)
            return list(range(int(dimension.low), int(dimension.high) + 1, step))
        return [spec.space.fixed.get(name, fixed)]

    widths = values("hidden_size", spec.model.hidden_size)
    heads = values("num_heads", spec.model.num_heads)
    where = ("search", "num_heads") if "num_heads" in spec.space.dimensions else ("model", "num_heads")
    for width in widths or ():
        for count in heads or ():
            if count is not None and width % count:
                return [Problem(path=where, message=f"num_heads ({count}) does not divide hidden_size ({width})")]
    return []


def _wrong_start(space: Space, start: dict[str, Any], path: KeyPath) -> Iterator[Problem]:
    if not start:
        yield Problem(path=path, message="expected a mapping from searched settings to values")
    for name, value in start.items():
        if name not in space.dimensions:
            known = ", ".join(space.dimensions)
            yield Problem(path=(*path, name), message=f"'{name}' is not searched; searched are {known}", at_key=True)
        elif not space.overlap({name: value}):
            yield Problem(path=(*path, name), message=f"{value!r} is not in the search space")
