"""The search space of a study file: what a scalar, a list, a range and `when:` mean.

A range of a setting that is a fraction or a rate is continuous; of any other setting it is whole numbers when both
ends are. Owns the reading of spaces, W&B's spelling included, and their size. Knows nothing of Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from hpsearch.spec.settings import Scalar


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of a few values."""

    values: tuple[Scalar, ...]
    prior: Scalar | None = None
    """Where a person believes the best value to be."""
    when: tuple[tuple[str, Choice | Range], ...] = ()

    def __contains__(self, value: object) -> bool:
        return any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in self.values)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; whole numbers when `integer`."""

    low: float
    high: float
    integer: bool = False
    log: bool = False
    step: float | None = None
    prior: float | None = None
    """Where a person believes the best value to be."""
    when: tuple[tuple[str, Choice | Range], ...] = ()

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    @property
    def size(self) -> float:
        """Number of values; infinity for a continuous range."""
        if self.step is not None:
            return math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return self.high - self.low + 1 if self.integer else math.inf


Dimension = Choice | Range


@dataclass(frozen=True, kw_only=True)
class Space:
    """Fixed values and dimensions; a dimension comes after the ones that its `when` names."""

    fixed: dict[str, Scalar]
    dimensions: dict[str, Dimension]

    @property
    def size(self) -> float:
        """Number of different settings (an upper bound when `when:` is used); infinity if a range is continuous."""
        return math.prod(
            len(dimension.values) if isinstance(dimension, Choice) else dimension.size
            for dimension in self.dimensions.values()
        )

    @property
    def priors(self) -> dict[str, Scalar]:
        """The values that a person believes in, of the settings that have one."""
        return {name: there.prior for name, there in self.dimensions.items() if there.prior is not None}

    def overlap(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Of settings from elsewhere, those that this space can take, as it takes them."""
        return {
            name: as_taken(there, params[name])
            for name, there in self.dimensions.items()
            if name in params and params[name] in there
        }

    def settings(self, most: int) -> Iterator[dict[str, Any]]:
        """Every setting of a finite space, each once; what `when` makes inactive is left out. At most `most`."""

        def complete(names: list[str], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
            if not names:
                yield chosen
                return
            name, *rest = names
            values = listed(self.dimensions[name]) if self.is_active(name, chosen) else None
            if values is None:
                yield from complete(rest, chosen)
            else:
                for value in values:
                    yield from complete(rest, {**chosen, name: value})

        return islice(complete(list(self.dimensions), {}), most)

    def draw(self, rng: Random) -> dict[str, Any]:
        """A setting at random, evenly over each dimension."""
        chosen: dict[str, Any] = {}
        for name, dimension in self.dimensions.items():
            if self.is_active(name, chosen):
                chosen[name] = _drawn(dimension, rng)
        return chosen

    def is_active(self, name: str, values: Mapping[str, Any]) -> bool:
        """True if the `when:` of this dimension holds for the values sampled so far."""
        return all(parent in values and values[parent] in allowed for parent, allowed in self.dimensions[name].when)

    def largest(self, name: str, default: float) -> float:
        """The largest value that a numeric setting can take."""
        dimension = self.dimensions.get(name)
        if isinstance(dimension, Range):
            return dimension.high
        if isinstance(dimension, Choice):
            return max(float(value) for value in dimension.values)
        return float(self.fixed.get(name, default))


def listed(dimension: Dimension) -> list[Any]:
    """The values of a finite dimension."""
    if isinstance(dimension, Choice):
        return list(dimension.values)
    step = dimension.step or 1
    values = [dimension.low + index * step for index in range(int(dimension.size))]
    return [int(value) if dimension.integer else float(value) for value in values]


def _drawn(dimension: Dimension, rng: Random) -> Any:
    if isinstance(dimension, Choice):
        return rng.choice(dimension.values)
    if dimension.step is not None:
        value = dimension.low + dimension.step * rng.randrange(int(dimension.size))
    elif dimension.log:
        value = math.exp(rng.uniform(math.log(dimension.low), math.log(dimension.high)))
    else:
        value = rng.uniform(dimension.low, dimension.high)
    value = min(max(value, dimension.low), dimension.high)
    return round(value) if dimension.integer else float(value)


def as_taken(dimension: Dimension, value: Any) -> Any:
    if isinstance(dimension, Choice):
        return next(own for own in dimension.values if value in Choice(values=(own,)))
    return int(value) if dimension.integer else float(value)


def narrowed(old: Space, new: Space) -> list[str]:
    """Why `new` does not hold everything that `old` does, in words; empty when it does, and trials of both compare."""
    problems = [
        f"search.{name} was fixed at {value}" for name, value in old.fixed.items() if new.fixed.get(name) != value
    ]
    problems += [
        f"search.{name} was not searched" for name in new.dimensions if name not in (*old.dimensions, *old.fixed)
    ]
    problems += [f"search.{name} was not set" for name in new.fixed if name not in (*old.dimensions, *old.fixed)]
    for name, was in old.dimensions.items():
        now = new.dimensions.get(name)
        if now is None:
            problems.append(f"search.{name} is not searched any more")
        elif type(was) is not type(now) or was.when != now.when:
            problems.append(f"search.{name} is another kind of setting now")
        elif isinstance(was, Choice):
            problems += [f"search.{name} lacks {value}" for value in was.values if value not in now]
        elif isinstance(now, Range):
            problems += _narrowed_range(name, was, now)
    return problems


def _narrowed_range(name: str, was: Range, now: Range) -> Iterator[str]:
    if (was.integer, was.log, was.step) != (now.integer, now.log, now.step):
        yield f"search.{name} is another kind of range now (whole numbers, scale or step)"
    elif now.low > was.low or now.high < was.high:
        yield f"search.{name} lacks some of {was.low:g} to {was.high:g}"
    elif was.step is not None and not math.isclose((was.low - now.low) / was.step % 1.0, 0.0, abs_tol=1e-9):
        yield f"search.{name} does not step on {was.low:g} any more"
