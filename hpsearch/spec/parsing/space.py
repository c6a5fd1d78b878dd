"""From `search:` of a study file, or a pasted W&B sweep, to a Space; every mistake with its key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from hpsearch.errors import Problem
from hpsearch.spec.parsing.yaml_file import KeyPath
from hpsearch.spec.settings import SEARCHABLE, SYNONYMS, Scalar
from hpsearch.spec.space import Choice, Dimension, Range, Space, as_taken


def parse_space(raw: Any, path: KeyPath = ("search",)) -> tuple[Space, list[Problem]]:
    """The space that a `search:` mapping describes, and everything wrong with it."""
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        return Space(fixed={}, dimensions={}), [
            Problem(path=path, message=f"expected a mapping from settings to values, got {_shown(raw)}")
        ]
    fixed: dict[str, Scalar] = {}
    dimensions: dict[str, Dimension] = {}
    problems: list[Problem] = []
    for name, here, value in _entries(raw, path):
        if name not in SEARCHABLE and not (name.startswith("config.") and len(name) > len("config.")):
            problems.append(Problem(path=here, message=f"unknown setting{_hint(name)}", at_key=True))
            continue
        try:
            parsed = _parse_entry(name, value)
        except _WrongError as wrong:
            problems.append(Problem(path=(*here, *wrong.path), message=wrong.message, at_key=wrong.at_key))
            continue
        if isinstance(parsed, Choice | Range):
            dimensions[name] = parsed
        else:
            fixed[name] = parsed
    ordered, order_problems = _ordered(dimensions, fixed, path)
    return Space(fixed=fixed, dimensions=ordered), problems + order_problems


def _entries(raw: dict[str, Any], path: KeyPath) -> Iterator[tuple[str, KeyPath, Any]]:
    """Name, place and value of every entry; `config: {KEY: ...}` is the same as `config.KEY: ...`."""
    for name, value in raw.items():
        if name == "config" and isinstance(value, dict):
            for key, inner in value.items():
                yield f"config.{key}", (*path, name, key), inner
        else:
            yield name, (*path, name), value


class _WrongError(Exception):
    def __init__(self, message: str, *path: str | int, at_key: bool = False) -> None:
        self.message, self.path, self.at_key = message, path, at_key


_RANGE_KEYS = ("min", "max", "scale", "step", "prior", "when", "values", "value", "distribution", "q", "log")


def _parse_entry(name: str, raw: Any) -> Scalar | Dimension:
    if isinstance(raw, list):
        return Choice(values=_values(name, raw, ()))
    if not isinstance(raw, dict):
        return _checked(name, raw, ())
    for key in raw:
        if key not in _RANGE_KEYS:
            near = difflib.get_close_matches(str(key), _RANGE_KEYS, n=1, cutoff=0.5)
            synonyms = {"low": "min", "lower": "min", "high": "max", "upper": "max", "choices": "values"}
            best = synonyms.get(str(key)) or (near[0] if near else None)
            hint = f"; did you mean '{best}'?" if best else f"; known keys: {', '.join(_RANGE_KEYS[:7])}"
            raise _WrongError(f"unknown key '{key}'{hint}", key, at_key=True)
    raw = dict(raw)
    if "prior" in raw:
        prior = raw.pop("prior")
        return _with_prior(_parse_entry(name, raw), prior)
    when = _parse_when(raw.pop("when")) if "when" in raw else ()
    if "value" in raw:
        _only(raw, "value", "distribution")
        value = _checked(name, raw["value"], ("value",))
        return Choice(values=(value,), when=when) if when else value
    if "values" in raw:
        _only(raw, "values", "distribution")
        return Choice(values=_values(name, raw["values"], ("values",)), when=when)
    return _parse_range(name, raw, when)


def _with_prior(parsed: Scalar | Dimension, prior: Any) -> Dimension:
    if not isinstance(parsed, Choice | Range):
        raise _WrongError("a fixed value needs no prior", "prior", at_key=True)
    if prior not in parsed:
        expected = (
            f"one of {', '.join(map(str, parsed.values))}"
            if isinstance(parsed, Choice)
            else f"a number from {parsed.low:g} to {parsed.high:g}"
        )
        raise _WrongError(f"expected {expected}, got {_shown(prior)}", "prior")
    if isinstance(parsed, Range) and parsed.integer and prior != int(prior):
        raise _WrongError(f"expected a whole number, got {prior}", "prior")
    return replace(parsed, prior=as_taken(parsed, prior))


_DISTRIBUTIONS = {
    # W&B's name: (logarithmic, whole numbers, stepped by q)
    "uniform": (False, False, False),
    "log_uniform_values": (True, False, False),
    "int_uniform": (False, True, False),
    "q_uniform": (False, False, True),
    "q_log_uniform_values": (True, False, True),
}


def _parse_range(name: str, raw: dict[str, Any], when: tuple[tuple[str, Dimension], ...]) -> Dimension:
    for key in ("min", "max"):
        if key not in raw:
            raise _WrongError(f"a range needs '{key}' (or give 'values' for choices)")
        if not _is_number(raw[key]):
            raise _WrongError(f"expected a number, got {_shown(raw[key])}", key)
    log = _scale_is_log(raw)
    step = raw.get("step", raw.get("q"))
    integer = isinstance(raw["min"], int) and isinstance(raw["max"], int) and not _is_float(name)
    if "distribution" in raw:
        known = raw["distribution"]
        if known not in _DISTRIBUTIONS:
            extra = "; its bounds are exponents there, write log_uniform_values" if known == "log_uniform" else ""
            raise _WrongError(
                f"unknown distribution {_shown(known)}{extra}; known: {', '.join(_DISTRIBUTIONS)}", "distribution"
            )
        log, whole, stepped = _DISTRIBUTIONS[known]
        if whole and not integer:
            raise _WrongError("int_uniform needs whole numbers at both ends", "distribution")
        if stepped:
            return _parse_quantised(name, raw, 1 if step is None else step, when)
        integer = integer and (whole or _is_whole(name))
    low, high = raw["min"], raw["max"]
    if low >= high:
        raise _WrongError(f"min ({low}) must be below max ({high})")
    if log and low <= 0:
        raise _WrongError(f"a log range must start above 0, got min: {low}", "min")
    if step is not None:
        key = "step" if "step" in raw else "q"
        if not _is_number(step) or step <= 0:
            raise _WrongError(f"expected a number above 0, got {_shown(step)}", key)
        if step > high - low:
            raise _WrongError(f"step ({step}) is larger than the range ({low} to {high})", key)
        if log:
            raise _WrongError("a log range has no step; give the values as a list instead", key)
        if integer and not isinstance(step, int):
            raise _WrongError(f"whole-number bounds need a whole-number step, got {step}", key)
    for key in ("min", "max"):
        value = _checked(name, raw[key], (key,))
        if isinstance(value, int) and not isinstance(raw[key], int):
            raise _WrongError(f"expected a whole number, got {raw[key]}", key)
    if _is_whole(name) and not integer:
        raise _WrongError(f"{name} takes whole numbers; write whole numbers at both ends")
    return Range(low=low, high=high, integer=integer, log=log, step=step, when=when)


_LEVELS = 64
"""Values of a quantised logarithmic range: no more are told apart."""


def _parse_quantised(name: str, raw: dict[str, Any], q: Any, when: tuple[tuple[str, Dimension], ...]) -> Dimension:
    """W&B's `q_` distributions: the multiples of q between min and max, evenly spread on their scale.

    https://docs.wandb.ai/guides/sweeps/sweep-config-keys (distribution options)
    """
    key = "q" if "q" in raw else "step"
    low, high = raw["min"], raw["max"]
    if not _is_number(q) or q <= 0:
        raise _WrongError(f"expected a number above 0, got {_shown(q)}", key)
    first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
    if last < first or (last == first and low != high):
        raise _WrongError(f"only multiples of {q} count, and {low} to {high} has fewer than two", key)
    is_whole = isinstance(q, int) and not _is_float(name)
    if raw["distribution"] == "q_uniform":
        bounds = {"min": first * q, "max": last * q}
        for bound, value in bounds.items():
            _checked(name, value if is_whole else float(value), (bound,))
        return Range(low=bounds["min"], high=bounds["max"], integer=is_whole, step=q, when=when)
    if first <= 0:
        raise _WrongError(f"a log range must start above 0, got min: {low}", "min")
    steps = [first * (last / first) ** (level / (_LEVELS - 1)) for level in range(_LEVELS)]
    multiples = dict.fromkeys(round(step) for step in steps)
    values = tuple(_checked(name, step * q if is_whole else float(step * q), ("min",)) for step in multiples)
    return Choice(values=values, when=when)


def _scale_is_log(raw: dict[str, Any]) -> bool:
    if "log" in raw and not isinstance(raw["log"], bool):
        raise _WrongError(f"expected true or false, got {_shown(raw['log'])}", "log")
    if "scale" in raw and raw["scale"] not in ("log", "linear"):
        raise _WrongError(f"expected log or linear, got {_shown(raw['scale'])}", "scale")
    return bool(raw.get("log", raw.get("scale") == "log"))


def _parse_when(raw: Any) -> tuple[tuple[str, Dimension], ...]:
    if not isinstance(raw, dict) or not raw:
        raise _WrongError("expected a mapping from another setting to its value, list of values or min/max", "when")
    conditions: list[tuple[str, Dimension]] = []
    for parent, allowed in raw.items():
        if isinstance(allowed, dict):
            unknown = set(allowed) - {"min", "max"}
            if unknown or not allowed or not all(_is_number(bound) for bound in allowed.values()):
                raise _WrongError("expected min and max as numbers", "when", parent)
            low, high = allowed.get("min", -math.inf), allowed.get("max", math.inf)
            conditions.append((parent, Range(low=low, high=high)))
        else:
            values = allowed if isinstance(allowed, list) else [allowed]
            if not values or not all(isinstance(value, Scalar) for value in values):
                raise _WrongError(f"expected a value or a list of values, got {_shown(allowed)}", "when", parent)
            conditions.append((parent, Choice(values=tuple(values))))
    return tuple(conditions)


def _values(name: str, raw: Any, path: KeyPath) -> tuple[Scalar, ...]:
    if not isinstance(raw, list) or not raw:
        raise _WrongError("empty: expected at least one value", *path)
    values = tuple(_checked(name, value, (*path, index)) for index, value in enumerate(raw))
    for index, value in enumerate(values):
        if any(value == earlier and type(value) is type(earlier) for earlier in values[:index]):
            raise _WrongError(f"{_shown(value)} is given twice", *path, index)
    return values


def _checked(name: str, value: Any, path: KeyPath) -> Scalar:
    """The value as the setting's type, or _WrongError with what was expected."""
    if not isinstance(value, Scalar):
        raise _WrongError(f"expected a number, text, true or false, got {_shown(value)}", *path)
    if name.startswith("config."):
        return value
    owner = SEARCHABLE[name]
    try:
        return getattr(owner(**{name: value}), name)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise _WrongError(f"{readable(error.errors()[0])}", *path) from None


def _ordered(
    dimensions: dict[str, Dimension], fixed: dict[str, Scalar], path: KeyPath
) -> tuple[dict[str, Dimension], list[Problem]]:
    """The dimensions with parents first, and every `when` that cannot hold."""
    problems = []
    for name, parent in _conditions(dimensions):
        if parent not in dimensions:
            what = "has one fixed value" if parent in fixed else "is not searched"
            near = difflib.get_close_matches(parent, dimensions, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(
                Problem(path=(*path, name, "when", parent), message=f"'{parent}' {what}{hint}", at_key=True)
            )
    ordered: dict[str, Dimension] = {}
    waiting = dict(dimensions)
    while waiting:
        ready = [
            name
            for name, dimension in waiting.items()
            if all(parent in ordered or parent not in dimensions for parent, _ in dimension.when)
        ]
        if not ready:
            name = next(iter(waiting))
            problems.append(Problem(path=(*path, name, "when"), message="depends on itself, by way of other settings"))
            break
        for name in ready:
            ordered[name] = waiting.pop(name)
    return ordered, problems


def _conditions(dimensions: dict[str, Dimension]) -> Iterator[tuple[str, str]]:
    for name, dimension in dimensions.items():
        for parent, _ in dimension.when:
            yield name, parent


def readable(error: Any) -> str:
    """pydantic's message in plain words, with the value that was got."""
    kind, context, got = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "missing":
        return "missing"
    expected = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "dict_type": "a mapping (key: value)",
        "model_type": "a mapping (key: value)",
        "model_attributes_type": "a mapping (key: value)",
        "list_type": "a list",
        "greater_than": f"more than {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "literal_error": context.get("expected", ""),
        "enum": context.get("expected", ""),
    }.get(kind)
    if expected:
        return f"expected {expected}, got {_shown(got)}"
    return str(error["msg"]).removeprefix("Value error, ")


def _only(raw: dict[str, Any], *allowed: str) -> None:
    for key in raw:
        if key not in allowed:
            raise _WrongError(f"'{key}' cannot stand beside '{allowed[0]}'", key, at_key=True)


def _hint(name: str) -> str:
    near = SYNONYMS.get(name) or next(iter(difflib.get_close_matches(name, SEARCHABLE, n=1)), None)
    return f"; did you mean '{near}'?" if near else f"; known: {', '.join(sorted(SEARCHABLE))}, config.KEY"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(name: str) -> bool:
    owner = SEARCHABLE.get(name)
    return owner is not None and owner.model_fields[name].annotation in (int, int | None)


def _is_float(name: str) -> bool:
    owner = SEARCHABLE.get(name)
    return owner is not None and owner.model_fields[name].annotation in (float, float | None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
